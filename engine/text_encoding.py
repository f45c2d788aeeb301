"""Text embeddings for the UNet, cached: prompts repeat."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

CACHED_TEXTS: Final = 1024  # 77 x 768 half floats each: 120 MB for Stable Diffusion 1.5


#: token ids to [B, tokens, features], and from XL's second one also pooled, [B, features]
Encoder = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def clip_encoders(networks: Sequence[Any]) -> list[Encoder]:
    """Return transformers' CLIPs as encoders: of XL's two, the last layer but one."""
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
        max_rows: int = CACHED_TEXTS,
    ) -> None:
        """Encode at most `max_rows` texts at once."""
        self._pairs = list(zip(tokenizers, encoders, strict=True))
        self._device = device
        self._max_rows = max_rows
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._shape = torch.Size()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return one embedding per prompt, in order; see `parts`. Long texts are truncated."""
        missing = [text for text in dict.fromkeys(prompts) if text not in self._cache]
        for first in range(0, len(missing), self._max_rows):
            chunk = missing[first : first + self._max_rows]
            for text, embedding in zip(chunk, self._encode(chunk), strict=True):
                # a copy: a view keeps its whole batch alive, and the next call may overwrite it
                self._cache[text] = embedding.clone()
        embeddings = [self._cache[text] for text in prompts]
        for text in prompts:
            self._cache.move_to_end(text)
        while len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)
        return torch.stack(embeddings)

    def parts(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split embeddings into [B, tokens, features] and, for XL, pooled [B, features]."""
        if len(self._pairs) == 1:
            return embeddings, None
        size = self._shape.numel()
        return embeddings[:, :size].unflatten(1, self._shape), embeddings[:, size:]

    def _encode(self, texts: Sequence[str]) -> Tensor:
        outputs = [encoder(self._tokens(tokenizer, texts)) for tokenizer, encoder in self._pairs]
        hidden_states = torch.cat([hidden for hidden, _ in outputs], dim=-1)
        pooled = outputs[-1][1]
        if pooled is None:
            return hidden_states
        # One flat row per text: callers need not know about pooled embeddings.
        self._shape = hidden_states.shape[1:]
        return torch.cat([hidden_states.flatten(1), pooled], dim=1)

    def _tokens(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self._device)  # type: ignore[no-any-return]  # transformers is not typed here
