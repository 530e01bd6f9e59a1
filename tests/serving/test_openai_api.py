"""Log-probabilities in OpenAI's forms: one entry per token, whatever it reads as, and where its text begins."""

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from yunque.runtime.tokenizer import Tokenizer
from yunque.serving.openai_api import _by_text
from yunque.serving.requests import TokenLogprob, TopLogprob
from yunque.serving.text import TextWriter


def test_tokens_that_read_the_same_are_all_told_and_the_chosen_one_by_its_own_number():
    others = (TopLogprob(7, b"a", -0.5), TopLogprob(8, b"a", -1.5), TopLogprob(9, b"\xf0", -2.0))
    chosen = TokenLogprob(8, b"a", -1.5, others)
    assert _by_text(chosen) == {"token_id:7": -0.5, "a": -1.5, r"bytes:\xf0": -2.0}


def test_a_chosen_token_that_is_not_among_the_most_probable_is_told_beside_them():
    chosen = TokenLogprob(5, b"rare", -9.0, (TopLogprob(7, b"a", -0.5), TopLogprob(8, b"b", -1.5)))
    assert list(_by_text(chosen)) == ["a", "b", "rare"]


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"\xc3\xb1", "\u00f1"), (b"\xc3", r"bytes:\xc3"), (b"\x9f\x98", r"bytes:\x9f\x98"), (b"", "")],
)
def test_bytes_that_are_no_text_are_escaped(content, text):
    assert TopLogprob(3, content, -1.0).text == text


def metaspace(folder):
    words = ["<unk>", "\u2581Hello", "\u2581world", "!", "\u2581"]
    inner = FastTokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def byte_level(folder):
    inner = FastTokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("make", "tokens", "offsets"),
    [
        (metaspace, lambda _: [1, 2, 3], [0, 5, 11]),  # the space before the first word is none of the text's
        (byte_level, lambda made: made.encode(["a\u00f1b"])[0], [0, 1, 1, 2]),  # both bytes of a letter begin it
    ],
    ids=["metaspace", "byte level"],
)
def test_offsets_are_places_in_the_text(tmp_path, make, tokens, offsets):
    tokenizer = make(tmp_path)
    writer, found, text = TextWriter(tokenizer, ()), [], ""
    for token in tokens(tokenizer):
        found.append(writer.length)
        text += writer.add(token)
    assert found == offsets
    assert text + writer.finish() == tokenizer.decode(tokens(tokenizer))
