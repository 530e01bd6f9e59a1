"""Text as it is made: what is shown in parts is what the whole decodes to, and each token costs the same."""

import random

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from yunque.runtime.tokenizer import Tokenizer, cleaned_up
from yunque.serving.text import Detokenizer, TextWriter

WORDS = ["hello", " world", " naïve", " 你好", "🙂", "\n", " it's", " ", "  ", "é", " don", "'t", ".", " ."]


class Decoding:
    """The runtime's tokenizer over one made in code; counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.cleans_up = tokenizer.cleans_up
        self.is_special, self.open_tokens = tokenizer.is_special, tokenizer.open_tokens
        self.decoded = 0

    def decode_raw(self, tokens):
        self.decoded += len(tokens)
        return self.tokenizer.decode_raw(tokens)


@pytest.fixture
def decoding(tmp_path):
    def made(inner):
        inner.save(str(tmp_path / "tokenizer.json"))
        return Decoding(Tokenizer(tmp_path))

    return made


def byte_level():
    """Every byte a token, and some words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    inner = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["</s>"])
    return inner


def sentencepiece():
    """Letters with word marks, and bytes for what is none."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [chr(number) for number in range(33, 127)]
    inner = FastTokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], unk_token="<unk>",
            byte_fallback=True,
        )
    )  # fmt: skip
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["</s>"])
    return inner


def test_a_character_in_the_making_is_held_back_and_shown_at_the_end(decoding):
    inner = byte_level()
    tokens = inner.encode("a🙂").ids
    detokenizer = Detokenizer(decoding(inner))
    assert [detokenizer.add(token) for token in tokens] == ["a", "", "", "", "🙂"]
    detokenizer = Detokenizer(decoding(inner))
    assert [detokenizer.add(token) for token in tokens[:-1]] == ["a", "", "", ""]
    assert detokenizer.finish() == inner.decode(tokens[:-1])[1:] != ""


def test_bytes_of_whole_characters_are_shown_whatever_follows(decoding):
    inner = sentencepiece()
    tokens = [inner.token_to_id(f"<0x{byte:02X}>") for byte in "日本".encode()]
    detokenizer = Detokenizer(decoding(inner))
    assert [detokenizer.add(token) for token in tokens[:5]] == ["", "", "日", "", ""]
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("kind", ["text", "broken bytes", "special tokens", "spaces"])
def test_every_token_costs_the_same(make, kind, decoding):
    inner = make()
    if kind == "text":
        tokens = inner.encode("hello 你好 world " * 60).ids
    elif kind == "broken bytes":
        tokens = [inner.token_to_id("<0xE4>") or inner.encode("你").ids[0]] * 600
    elif kind == "spaces":
        tokens = inner.encode(" " * 600).ids
    else:
        tokens = inner.encode("hi").ids + [inner.token_to_id("</s>")] * 600
    counted = decoding(inner)
    detokenizer = Detokenizer(counted)
    shown = "".join(detokenizer.add(token) for token in tokens) + detokenizer.finish()
    assert counted.decoded < 60 * len(tokens)
    assert shown == counted.tokenizer.decode(tokens)


class Characters:
    """Each token is a character; spaces before punctuation go."""

    cleans_up = True

    def decode_raw(self, tokens):
        return "".join(tokens)

    def is_special(self, token):
        return False

    def open_tokens(self, tokens):
        return 0


def test_cleaned_parts_are_the_cleaned_whole():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("  'nt.,vrems x") for _ in range(rng.randrange(1, 14)))
        detokenizer = Detokenizer(Characters())
        assert "".join(detokenizer.add(character) for character in text) + detokenizer.finish() == cleaned_up(text)
    detokenizer = Detokenizer(Characters())
    assert "".join(detokenizer.add(character) for character in "all of it") == "all of it"


def test_stop_strings_are_held_back_and_cut_off():
    rng = random.Random(1)
    plain = type("Plain", (Characters,), {"cleans_up": False})()
    for _ in range(2000):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 15)))
        stop = tuple("".join(rng.choice("abc") for _ in range(rng.randrange(2, 5))) for _ in range(2))
        writer, shown, end = TextWriter(plain, stop), "", len(text)
        for place, character in enumerate(text):
            shown += writer.add(character)
            assert not any(ending in shown for ending in stop)
            # As much as can be: what is held back could still become a stop string.
            held = text[len(shown) : place + 1]
            assert writer.stopped or not held or any(ending.startswith(held) for ending in stop)
            if writer.stopped:
                end = place + 1
                break
        shown += writer.finish()
        found = [text[:end].find(ending) for ending in stop if ending in text[:end]]
        assert shown == (text[: min(found)] if found else text)
        assert writer.stopped == any(ending in text for ending in stop)
