"""The tokenizer of a model folder, from ``tokenizer.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from yunque.errors import InputError


class Tokenizer:
    """Texts to token ids and back."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder}: holds no tokenizer.json")
        try:
            self._inner = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        self._inner.no_padding()
        self._inner.no_truncation()
        self._cleans_up = _cleans_up(folder)

    def encode(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids, with the special tokens the model expects unless the texts hold them already."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        return [encoding.ids for encoding in encoded]

    def encode_truncated(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """As ``encode``, cut to ``max_length`` tokens with the special tokens kept."""
        self._inner.enable_truncation(max_length)
        try:
            return self.encode(texts)
        finally:
            self._inner.no_truncation()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` without special tokens."""
        text = str(self._inner.decode(list(tokens), skip_special_tokens=True))
        return _cleaned_up(text) if self._cleans_up else text

    @property
    def vocab_size(self) -> int:
        """Number of tokens with the added ones."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))


def _cleans_up(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    return bool(config.get("clean_up_tokenization_spaces", False))


def _cleaned_up(text: str) -> str:
    """Without the spaces before punctuation and English contractions, as transformers does for old tokenizers."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
