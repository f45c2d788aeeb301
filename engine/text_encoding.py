"""Texts as a UNet reads them, remembered: the same words come again and again."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

REMEMBERED_TEXTS: Final = 1024  # 77 x 768 half floats each: 120 MB for Stable Diffusion 1.5


#: of token ids, [B, tokens, features], and from XL's second one also their summary, [B, features]
Encoder = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def clip_encoders(networks: Sequence[Any]) -> list[Encoder]:
    """Transformers' CLIPs as Stable Diffusion reads them: of XL's two, the last layer but one."""
    if len(networks) == 1:
        return [lambda ids: (networks[0](ids)[0], None)]
    return [partial(_penultimate, network) for network in networks]


def _penultimate(network: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    output = network(ids, output_hidden_states=True)
    return output.hidden_states[-2], getattr(output, "text_embeds", None)


class TextEncoder:
    """One tokenizer and text encoder, or the two of Stable Diffusion XL."""

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[Encoder],
        device: torch.device,
        *,
        most_rows: int = REMEMBERED_TEXTS,
    ) -> None:
        """`most_rows`: so many texts an encoder takes at once."""
        self._pairs = list(zip(tokenizers, encoders, strict=True))
        self._device = device
        self._most_rows = most_rows
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()
        self._shape = torch.Size()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """What `parts` takes apart, [len(prompts), ...], in order. Long texts are cut off."""
        unknown = [text for text in dict.fromkeys(prompts) if text not in self._remembered]
        for first in range(0, len(unknown), self._most_rows):
            chunk = unknown[first : first + self._most_rows]
            for text, embedding in zip(chunk, self._encode(chunk), strict=True):
                # a copy: a view would keep its whole batch alive, and may be the next call's
                self._remembered[text] = embedding.clone()
        found = [self._remembered[text] for text in prompts]
        for text in prompts:
            self._remembered.move_to_end(text)
        while len(self._remembered) > REMEMBERED_TEXTS:
            self._remembered.popitem(last=False)
        return torch.stack(found)

    def parts(self, encoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, tokens, features], and for XL what it made of each text as a whole, [B, features]."""
        if len(self._pairs) == 1:
            return encoded, None
        size = self._shape.numel()
        return encoded[:, :size].unflatten(1, self._shape), encoded[:, size:]

    def _encode(self, texts: Sequence[str]) -> Tensor:
        said = [encoder(self._tokens(tokenizer, texts)) for tokenizer, encoder in self._pairs]
        words = torch.cat([hidden for hidden, _ in said], dim=-1)
        summary = said[-1][1]
        if summary is None:
            return words
        # In one flat row, so that nobody else need know.
        self._shape = words.shape[1:]
        return torch.cat([words.flatten(1), summary], dim=1)

    def _tokens(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self._device)  # type: ignore[no-any-return]  # not typed there
