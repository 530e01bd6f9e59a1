"""Texts of every kind of tokenizer as transformers has them, whole and as they are made, token by token."""

import random

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from yunque.runtime.tokenizer import Tokenizer
from yunque.serving.text import Detokenizer

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
TEXTS = [
    "Hello, world! It's fine . ¿Qué tal, señor? 日本語 🙂👩‍👩‍👧 don't we 've n't ? , ' s   x",
    "naïve café\n\tfoo  bar", "e\u0301 \u0301é \ufffd", "ü你好 ",
]  # fmt: skip
PIECES = ["日本", "🙂", " a", "é", ".", "'s", " don", "'t", " n't", " ", "  ", "\n", "?", "\ufffd", "e\u0301"]
LETTERS = [chr(number) for number in range(33, 127)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(inner, trainer, **options):
    inner.train_from_iterator(TEXTS, trainer(special_tokens=SPECIAL, show_progress=False, **options))
    return inner


def byte_level():
    inner = FastTokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained(inner, trainers.BpeTrainer, vocab_size=320, initial_alphabet=alphabet)
    inner.add_tokens(["<tool>", " plain"])
    return inner


def byte_fallback():
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *BYTES, "\u2581", *LETTERS, "\u2581a", "日"])}
    inner = FastTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def unigram():
    inner = FastTokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(inner, trainers.UnigramTrainer, vocab_size=150, unk_token="<unk>")


def word_piece():
    inner = FastTokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return trained(inner, trainers.WordPieceTrainer, vocab_size=200)


def word_ends():
    inner = FastTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return trained(inner, trainers.BpeTrainer, vocab_size=200, end_of_word_suffix="</w>")


KINDS = [byte_level, byte_fallback, unigram, word_piece, word_ends]


@pytest.fixture
def both(tmp_path):
    """A tokenizer of transformers and ours from its folder."""

    def saved(inner, **options):
        inner.add_special_tokens(SPECIAL)
        names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
        theirs = PreTrainedTokenizerFast(tokenizer_object=inner, **names, **options)
        theirs.save_pretrained(tmp_path)
        return theirs, Tokenizer(tmp_path)

    return saved


def some_tokens(theirs, rng):
    if rng.random() < 0.5:  # any, which need not be text
        return [rng.randrange(len(theirs)) for _ in range(rng.randrange(1, 30))]
    text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 12)))
    ids = theirs.encode(text, add_special_tokens=False)
    return ids[: rng.randrange(len(ids) + 1)] if rng.random() < 0.5 else ids


@pytest.mark.parametrize("cleans_up", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_transformers_whole_and_in_parts(kind, cleans_up, both):
    theirs, ours = both(kind(), clean_up_tokenization_spaces=cleans_up)
    rng = random.Random(0)
    compared = 0
    for _ in range(300):
        ids = some_tokens(theirs, rng)
        whole = ours.decode(ids)
        expected = theirs.decode(ids, skip_special_tokens=True)
        if kind is not byte_fallback or "\ufffd" not in expected:  # it gives up all bytes of a run with a cut one
            assert whole == expected, ids
            compared += 1
        detokenizer = Detokenizer(ours)
        assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == whole, ids
    assert compared > 100


def test_a_cut_character_costs_no_whole_one(both):
    _, ours = both(byte_fallback())
    ids = [ours._inner.token_to_id(f"<0x{byte:02X}>") for byte in "語🙂".encode()]
    assert ours.decode(ids) == "語🙂"
    assert ours.decode(ids[:-1]) == ours.decode(ids[:-3]) == "語\ufffd"
    assert ours.decode(ids[1:]) == "\ufffd\ufffd🙂"


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<s> $A", "<s> a", 1),
        ("<s> $A", "a", 1),
        ("<s> $A </s>", "<s>a</s>", 1),
        ("<s> $A", "a <s> <s>", 3),  # only the beginning is the tokenizer's
        ("$A </s>", "<s> a", 1),
        ("$A", "<s><s> a", 2),
    ],
)
def test_a_text_that_has_its_beginning_gets_no_second(template, text, expected, both):
    inner = byte_fallback()
    numbers = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    theirs, ours = both(inner)
    (ids,) = ours.encode([text])
    assert ids.count(0) == expected
    plain = ours.encode([text], special_tokens=False)
    assert plain == [theirs.encode(text, add_special_tokens=False)]
