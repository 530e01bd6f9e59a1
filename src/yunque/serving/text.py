"""From tokens to text as it is made: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from yunque.runtime.tokenizer import cleaned_up

_MOST_HELD = 16  # tokens without text
_OPEN_WORDS = frozenset({"n", "n'", "'", "'m", "'s", "'v", "'r", ".", "?", "!", ","})
"""Words that cleaning up may yet join with what is before or after them."""


class Decoder(Protocol):
    """The part of ``yunque.runtime.tokenizer.Tokenizer`` that is used here."""

    @property
    def cleans_up(self) -> bool:
        """Whether spaces before punctuation go."""

    def decode_raw(self, tokens: Sequence[int]) -> str:
        """Tokens as text."""

    def is_special(self, token: int) -> bool:
        """Whether texts leave the token out."""

    def open_tokens(self, tokens: Sequence[int]) -> int:
        """Number of tokens at the end whose text ends in one U+FFFD that further tokens may make a character."""


class Detokenizer:
    """Decodes a growing list of tokens; every token is decoded a bounded number of times.

    What decoders do at the start of a text (dropping a space) must not happen within: new tokens are decoded together
    with those of the former piece, whose own text is then cut off.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[int] = []  # of the former piece and since
        self._former = 0  # tokens of the former piece
        self._shown = 0  # characters of the text of ``_tokens`` that are final
        self._unclean = ""

    def add(self, token: int) -> str:
        """The text that ``token`` makes final."""
        if self._decoder.is_special(token):
            return ""
        self._tokens.append(token)
        text = self._decoder.decode_raw(self._tokens)
        open_tokens = self._decoder.open_tokens(self._tokens)
        new = text[self._shown : len(text) - (1 if open_tokens else 0)]
        self._shown += len(new)
        if not open_tokens or len(self._tokens) - self._former > _MOST_HELD:
            self._go_on(open_tokens)
        return self._cleaned(new) if self._decoder.cleans_up else new

    def _go_on(self, open_tokens: int) -> None:
        """Let the tokens since the former piece be the piece that the next ones are decoded with."""
        end = len(self._tokens) - open_tokens
        piece = self._tokens[self._former : end]
        known = self._decoder.decode_raw(piece)
        if known.strip(" "):
            self._tokens, self._former = piece + self._tokens[end:], len(piece)
        elif len(piece) > _MOST_HELD:  # without text, or spaces, of which a decoder may drop the first
            del self._tokens[self._former + (1 if known else 0) : end - (1 if known else 0)]
        else:
            return
        self._shown = len(self._decoder.decode_raw(self._tokens)) - (1 if open_tokens else 0)

    @property
    def held_chars(self) -> int:
        """Whole characters that cleaning up may yet change."""
        return len(self._unclean)

    def finish(self) -> str:
        """What was held back, as it is."""
        rest = self._decoder.decode_raw(self._tokens)[self._shown :]
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
        self._made = 0
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters of the text so far, with those that are held back."""
        return self._made + self._detokenizer.held_chars

    def add(self, token: int) -> str:
        """The text that may be shown after ``token``."""
        new = self._detokenizer.add(token)
        self._made += len(new)
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
