"""Texts as a UNet reads them, remembered: the same words come again and again."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

REMEMBERED_TEXTS: Final = 1024  # 77 x 768 half floats each: 120 MB for Stable Diffusion 1.5


class Texts:
    """One tokenizer and text encoder, or the two of Stable Diffusion XL."""

    def __init__(
        self, tokenizers: Sequence[Any], encoders: Sequence[Any], device: torch.device
    ) -> None:
        self._pairs = list(zip(tokenizers, encoders, strict=True))
        self._device = device
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()
        self._shape = torch.Size()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """What `parts` takes apart, [len(prompts), ...], in order. Long texts are cut off."""
        unknown = [text for text in dict.fromkeys(prompts) if text not in self._remembered]
        if unknown:
            self._remember(zip(unknown, self._encode(unknown), strict=True))
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
        if len(self._pairs) == 1:
            [(tokenizer, encoder)] = self._pairs
            return encoder(self._tokens(tokenizer, texts))[0]  # type: ignore[no-any-return]
        # As XL was trained: both encoders' last layer but one beside each other, and the second's
        # pooled output. In one flat row, so that nobody else need know.
        outputs = [
            encoder(self._tokens(tokenizer, texts), output_hidden_states=True)
            for tokenizer, encoder in self._pairs
        ]
        words = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        self._shape = words.shape[1:]
        return torch.cat([words.flatten(1), outputs[-1].text_embeds], dim=1)

    def _tokens(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self._device)  # type: ignore[no-any-return]  # not typed there

    def _remember(self, texts: Iterable[tuple[str, Tensor]]) -> None:
        for text, embedding in texts:
            self._remembered[text] = embedding.clone()  # a view would keep its whole batch alive
