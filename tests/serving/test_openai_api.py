"""The forms of OpenAI's answers, whatever the tokens are."""

from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from yunque.runtime.batch import LENGTH, RUNNING
from yunque.runtime.options import GenerationOptions
from yunque.runtime.tokenizer import Tokenizer
from yunque.serving.openai_api import _Chats, _Completions
from yunque.serving.requests import TokenLogprob, TopLogprob
from yunque.serving.row_text import RowText

TEXT = " a\u00e9\U0001f600 b"
HALVES = (
    TopLogprob(5, b"\xf0\x9f", -0.1), TopLogprob(6, b"\xf0", -0.2), TopLogprob(7, b"\x9f", -0.3),
    TopLogprob(8, b"\xff", -0.4), TopLogprob(9, b"!", -0.5),
)  # fmt: skip
TWINS = (*(TopLogprob(number, b"A", -number) for number in (1, 2, 3)), TopLogprob(4, b"\xef\xbf\xbd", -4.0))


def form(kind, top_logprobs):
    job = SimpleNamespace(
        options=GenerationOptions(logprobs=True, top_logprobs=top_logprobs),
        told=SimpleNamespace(request_id="r"),
        served=SimpleNamespace(name="m", manifest_sha256=""),
    )
    return kind(job, SimpleNamespace(stream_options=None))


@pytest.mark.parametrize("top", [HALVES, TWINS])
@pytest.mark.parametrize("place", range(4))
def test_every_token_is_given_once_with_its_own_number(top, place):
    chosen = TokenLogprob(top[place].token, top[place].bytes, top[place].logprob, top)
    legacy = form(_Completions, len(top))._logprobs([chosen])
    (by_text,), (name,) = legacy["top_logprobs"], legacy["tokens"]
    assert sorted(by_text.values()) == sorted(each.logprob for each in top)
    assert by_text[name] == legacy["token_logprobs"][0] == chosen.logprob
    (chat,) = form(_Chats, len(top))._logprobs([chosen])["content"]
    assert [(bytes(each["bytes"]), each["logprob"]) for each in chat["top_logprobs"]] == [
        (each.bytes, each.logprob) for each in top
    ]


def test_names_of_bytes_and_of_twins():
    assert [each.text for each in HALVES] == ["bytes:\\xf0\\x9f", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\xff", "!"]
    found = form(_Completions, 4)._logprobs([TokenLogprob(2, b"A", -2.0, TWINS)])["top_logprobs"][0]
    assert found == {"A": -2.0, "token_id:1": -1.0, "token_id:3": -3.0, "\ufffd": -4.0}


def test_a_sampled_token_outside_the_most_probable_is_given_too():
    found = form(_Completions, 5)._logprobs([TokenLogprob(3, b"c", -9.0, HALVES)])["top_logprobs"][0]
    assert found["c"] == -9.0
    assert len(found) == 6


def byte_level():
    made = tokenizers.Tokenizer(models.BPE({sign: number for number, sign in enumerate(sorted(ALPHABET))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback():
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocab = {token: number for number, token in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


ALPHABET = pre_tokenizers.ByteLevel.alphabet()


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_offsets_are_places_in_the_text(tmp_path, make):
    """A leading space that decoding drops counts for nothing, and the bytes of one character for one."""
    inner = make()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    tokens = inner.encode(TEXT).ids
    model = SimpleNamespace(spec=SimpleNamespace(kind="causal"), tokenizer=tokenizer)
    options = GenerationOptions(logprobs=True, max_new_tokens=99)
    stream = SimpleNamespace(request=SimpleNamespace(prompt=[1], options=options))
    row, text, pieces = RowText(stream, 0, options, 99, 0.0, 9.0, model), "", []
    for number, token in enumerate(tokens):
        reason = LENGTH if number + 1 == len(tokens) else RUNNING
        event = row.take(SimpleNamespace(tokens=[token], reasons=[reason], logprobs=[0.0], top=None), 0)
        text, pieces = text + event.text, [*pieces, *event.logprobs]
    assert text == tokenizer.decode(tokens)
    assert b"".join(piece.bytes for piece in pieces).decode() == TEXT
    begin = {piece.bytes: piece.offset for piece in pieces if piece.bytes in (b"a", b" a", b"b")}
    assert all(text[place:].startswith(own.decode().lstrip()) for own, place in begin.items()), (text, begin)
    smile = [piece.offset for piece in pieces if piece.bytes in (b"\xf0", b"\x9f", b"\x98", b"\x80")]
    assert smile == [text.index("\U0001f600")] * 4
