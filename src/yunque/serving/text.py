"""From tokens to text as it is made: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from yunque.runtime.tokenizer import cleaned_up

_INCOMPLETE = "\ufffd"  # how bytes that are no character yet are decoded
_MOST_HELD = 16  # tokens without text; no character has so many
_OPEN_WORDS = frozenset({"n", "n'", "'", "'m", "'s", "'v", "'r", ".", "?", "!", ","})
"""Words that cleaning up may yet join with what is before or after them."""


class Decoder(Protocol):
    """The part of ``yunque.runtime.tokenizer.Tokenizer`` that is used here."""

    @property
    def cleans_up(self) -> bool:
        """Whether spaces before punctuation go."""

    def decode_raw(self, tokens: Sequence[int]) -> str:
        """Tokens as text."""


class Detokenizer:
    """Decodes a growing list of tokens; every token is decoded a bounded number of times.

    What decoders do at the start of a text (dropping a space) must not happen within: new tokens are decoded together
    with those of the former piece, whose own text is then cut off.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[int] = []  # of the former piece and since
        self._known = ""  # text of the former piece
        self._former = 0  # its tokens
        self._unclean = ""

    def add(self, token: int) -> str:
        """The text that ``token`` makes final."""
        self._tokens.append(token)
        text = self._decoder.decode_raw(self._tokens)
        new = text[len(self._known) :]
        held = len(self._tokens) - self._former
        if text.endswith(_INCOMPLETE) and held <= _MOST_HELD:
            return ""
        if not new:
            if held > _MOST_HELD:  # special tokens without end
                del self._tokens[self._former :]
            return ""
        piece = self._tokens[self._former :]
        known = self._decoder.decode_raw(piece)
        if known and (held > _MOST_HELD or not known.endswith(_INCOMPLETE)):
            self._tokens, self._former, self._known = piece, len(piece), known
        else:  # a lone space, say, which is dropped at the start of a text
            self._former, self._known = len(self._tokens), text
        return self._cleaned(new) if self._decoder.cleans_up else new

    def finish(self) -> str:
        """What was held back, as it is."""
        rest = self._decoder.decode_raw(self._tokens)[len(self._known) :]
        if not self._decoder.cleans_up:
            return rest
        rest, self._unclean = self._unclean + rest, ""
        return cleaned_up(rest)

    def _cleaned(self, new: str) -> str:
        """Cleaned text up to where nothing that comes can change it."""
        self._unclean += new
        for end in range(len(self._unclean), 0, -1):
            if _is_closed(self._unclean[:end]) and (end == len(self._unclean) or self._unclean[end] == " "):
                final, self._unclean = self._unclean[:end], self._unclean[end:]
                return cleaned_up(final)
        return ""


def _is_closed(text: str) -> bool:
    """Whether no pattern of cleaning up can begin in ``text`` and end behind it."""
    clean = cleaned_up(text)
    return not text.endswith(" ") and not {text.split(" ")[-1], clean.split(" ")[-1]} & _OPEN_WORDS


class TextWriter:
    """The text of one row as it may be shown: complete characters, cut before the first stop string."""

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decoder)
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False
        self.length = 0  # characters that are final, shown or not

    def add(self, token: int) -> str:
        """The text that may be shown after ``token``."""
        new = self._detokenizer.add(token)
        self.length += len(new)
        return self._release(new)

    def finish(self) -> str:
        """The rest of the text."""
        text = self._release(self._detokenizer.finish())
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return new
        text = self._held + new
        found = [place for place in (text.find(ending) for ending in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(ending.startswith(text[-length:]) for ending in self._stop):
                return length
        return 0
