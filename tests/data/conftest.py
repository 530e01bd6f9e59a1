"""What the tests of the data room share: real data where it is at hand, small files, small tokenizers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHARED = Path(__file__).resolve().parents[3] / "shared"


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no shared {name} beside the repository")
    return SHARED / name


@pytest.fixture
def shared_data() -> Path:
    return _shared("data")


@pytest.fixture
def shared_models() -> Path:
    return _shared("models")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines under the test's folder, gzip where the name says so."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def word_tokenizer(template: str, **options: Any) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark; ``template`` says which special tokens surround the text."""
    words = ["Summarize", "the", "following", "conversation", ".", "Summary", ":", *NUMBERS]
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


@pytest.fixture
def t5_like() -> PreTrainedTokenizerFast:
    return word_tokenizer("$A </s>")


@pytest.fixture
def llama_like() -> PreTrainedTokenizerFast:
    return word_tokenizer("<s> $A")
