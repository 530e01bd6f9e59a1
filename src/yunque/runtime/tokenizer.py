"""The tokenizer of a model folder, from ``tokenizer.json`` alone."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from yunque.errors import InputError

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_MOST_BYTES = 4  # of a character


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
        content = json.loads(path.read_text(encoding="utf-8"))
        self._cleans_up = _cleans_up(folder, (content.get("model") or {}).get("type"))
        decoder = content.get("decoder") or {}
        kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._special = {number for number, token in self._inner.get_added_tokens_decoder().items() if token.special}
        plain, whole = (self._inner.encode("a", add_special_tokens=special).ids for special in (False, True))
        self._lead = leading_tokens(plain, whole)

    def encode(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids, with the special tokens the model expects unless the texts hold them already.

        A text that begins with the beginning that it is to get (``<s>``) gets no second one.
        """
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        rows = [encoding.ids for encoding in encoded]
        return [without_second(self._lead, row, row) for row in rows] if special_tokens else rows

    def encode_truncated(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """As ``encode``, cut to ``max_length`` tokens with the special tokens kept."""
        self._inner.enable_truncation(max_length)
        try:
            return self.encode(texts)
        finally:
            self._inner.no_truncation()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` without special tokens."""
        text = self.decode_raw(tokens)
        return cleaned_up(text) if self._cleans_up else text

    def decode_raw(self, tokens: Sequence[int]) -> str:
        """As ``decode``, before spaces are cleaned up.

        Where byte tokens (``<0xE6>``) hold a character that is cut off, only that one becomes U+FFFD; the decoder of
        transformers gives up all characters of the bytes' run.
        """
        if self._byte_fallback:
            pieces = [self._inner.id_to_token(token) or "" for token in tokens if token not in self._special]
            mended = _mended(pieces)
            if mended != pieces:
                return str(self._inner.decoder.decode(mended))
        return str(self._inner.decode(list(tokens), skip_special_tokens=True))

    @property
    def cleans_up(self) -> bool:
        """Whether ``decode`` removes spaces before punctuation."""
        return self._cleans_up

    def is_special(self, token: int) -> bool:
        """Whether texts leave the token out."""
        return token in self._special

    def open_tokens(self, tokens: Sequence[int]) -> int:
        """Number of ``tokens`` at the end that others may complete to a character; their text then ends in U+FFFD."""
        parts: list[bytes] = []
        for token in reversed(tokens[-_MOST_BYTES:]):
            if not self._byte_level and not self._is_byte(token):
                break
            parts.append(self.token_bytes(token))
        last = b"".join(reversed(parts))
        left = len(last) - codecs.utf_8_decode(last, "replace", False)[1]
        count = 0
        while left > 0:
            left -= len(parts[count])
            count += 1
        return count

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for by itself; a special token's are its name."""
        piece = self._inner.id_to_token(token)
        if piece is None:
            return b""
        if token in self._special:
            return str(piece).encode()
        if self._byte_level:
            if all(character in _BYTES for character in piece):
                return bytes(_BYTES[character] for character in piece)
            return str(piece).encode()
        if self._is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def _is_byte(self, token: int) -> bool:
        return self._byte_fallback and _BYTE_TOKEN.fullmatch(self._inner.id_to_token(token) or "") is not None

    @property
    def vocab_size(self) -> int:
        """Number of tokens with the added ones."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))


def leading_tokens(plain: list[int], whole: list[int]) -> list[int]:
    """What ``whole``, the ids of a text with special tokens, has before ``plain``, the same text's without."""
    leads = (whole[:count] for count in range(len(whole) - len(plain) + 1))
    return next((lead for lead in leads if whole[len(lead) : len(lead) + len(plain)] == plain), [])


def without_second(lead: list[int], ids: Sequence[int], values: list[int]) -> list[int]:
    """``values``, one for each of ``ids``, without those of a second ``lead`` behind the first."""
    count = len(lead)
    return values[:count] + values[2 * count :] if count and list(ids[: 2 * count]) == lead * 2 else values


def _byte_alphabet() -> dict[str, int]:
    """The byte of every character that byte-level tokens are written in (Radford et al., 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


def _mended(pieces: list[str]) -> list[str]:
    """Tokens with U+FFFD in place of bytes that are no characters in their run."""
    mended: list[str] = []
    run: list[str] = []
    for piece in [*pieces, ""]:
        if piece and _BYTE_TOKEN.fullmatch(piece):
            run.append(piece)
            continue
        if run:
            text = bytes(int(byte[3:5], 16) for byte in run).decode(errors="replace")
            for character in text:
                as_bytes = [f"<0x{byte:02X}>" for byte in character.encode()]
                mended += [character] if character == "\ufffd" else as_bytes
            run = []
        mended.append(piece)
    return mended[:-1]


def _cleans_up(folder: Path, model: str | None) -> bool:
    """Whether spaces before punctuation go: as transformers has it, not for BPE, whose spaces are the text's own."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(config.get("clean_up_tokenization_spaces", False) and (model != "BPE" or forced))


def cleaned_up(text: str) -> str:
    """Without the spaces before punctuation and English contractions, as transformers does for old tokenizers."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
