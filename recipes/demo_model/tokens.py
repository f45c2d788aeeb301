"""Captions as numbers: a byte-pair tokenizer in CLIP's format, learned from the captions."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from recipes.demo_model.cast import Cast
from recipes.demo_model.composer import compose

LENGTH: Final = 77
START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
_WORD_END: Final = "</w>"
#: CLIP's own pattern (Radford et al. 2021): contractions, words, single digits, runs of the rest.
_PATTERN: Final = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Encoder:
    """Tokenizer for training: texts in, rows of LENGTH ids out."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size: int = self._tokenizer.get_vocab_size()
        self.start, self.end = (self._id(mark) for mark in (START, END))

    def _id(self, mark: str) -> int:
        found = self._tokenizer.token_to_id(mark)
        assert found is not None, mark
        return int(found)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int16]:
        """[len(texts), LENGTH]: start, the text, and ends to the end."""
        ids = np.full((len(texts), LENGTH), self.end, np.int16)
        ids[:, 0] = self.start
        for row, text in zip(ids, texts, strict=True):
            words = self._tokenizer.encode(text, add_special_tokens=False).ids[: LENGTH - 2]
            row[1 : 1 + len(words)] = words
        return ids


def captions_of(cast: Cast, count: int) -> Iterable[str]:
    """Captions to learn words from, then every name once more so that none is missing."""
    for at in range(count):
        yield compose(cast, f"tokenizer-{at}").caption
    for thing in cast.things:
        yield from (thing.name, *thing.words, *thing.keywords)


def train_tokenizer(texts: Iterable[str], folder: Path, *, size: int = 4096) -> None:
    """Write a CLIPTokenizer folder of at most `size` entries."""
    merges = _learned_merges(texts, size - 2 * 256 - 2)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(letter + _WORD_END for letter in alphabet)]
    entries += [first + second for first, second in merges] + [START, END]
    vocabulary = {entry: at for at, entry in enumerate(dict.fromkeys(entries))}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = "\n".join(f"{first} {second}" for first, second in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", "utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    _write_fast_tokenizer(vocabulary, merges, folder)
    _write_settings(folder)


def _learned_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    _read_like_clip(tokenizer)
    # The trainer counts its alphabet in; asking for more and cutting gives the same merges.
    trainer = trainers.BpeTrainer(
        vocab_size=count + 600,
        end_of_word_suffix=_WORD_END,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges[:count]]


def _read_like_clip(tokenizer: Tokenizer) -> None:
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _write_fast_tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], folder: Path
) -> None:
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=END,
            continuing_subword_prefix="",
            end_of_word_suffix=_WORD_END,
        )
    )
    _read_like_clip(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_settings(folder: Path) -> None:
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks), "utf-8")
    settings = {**marks, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
