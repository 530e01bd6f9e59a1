import json

import pytest

from yunque.errors import InputError
from yunque.rl.ledger import Ledger, content_hash


@pytest.fixture
def path(tmp_path):
    return tmp_path / "steps" / "answers.jsonl"


def ledger(path):
    return Ledger(path, ["answer"])


@pytest.fixture
def written(path):
    book = ledger(path)
    for name in ("one", "two", "three"):
        book.append(name, f"hash-{name}", {"answer": f"text {name} ñ\u2028"})
    return path


def test_lines_come_back_under_their_key_and_input(written):
    book = ledger(written)
    assert book.get("two", "hash-two")["answer"] == "text two ñ\u2028"
    assert book.get("two", "other") is None
    assert book.get("four", "hash-two") is None


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_half_written_last_line_is_dropped_and_the_file_goes_on(written, cut):
    whole = written.read_bytes()
    written.write_bytes(whole[:-cut])
    book = ledger(written)
    lost = book.get("three", "hash-three") is None
    assert lost == (cut > 1)  # without its newline alone the line is whole
    if lost:
        book.append("three", "hash-three", {"answer": "text three ñ\u2028"})
    assert written.read_bytes() == whole


def test_a_later_line_of_a_key_wins_and_compacting_keeps_it(written):
    book = ledger(written)
    book.append("one", "new", {"answer": "again"})
    assert ledger(written).get("one", "new")["answer"] == "again"
    book.compact(["one", "three"])
    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").split("\n") if line]
    assert [(line["key"], line["input"]) for line in lines] == [
        ("one", "new"),
        ("three", "hash-three"),
        ("two", "hash-two"),
    ]


def test_an_edited_field_is_kept(written):
    written.write_text(written.read_text().replace("text two", "EDITED"))
    assert ledger(written).get("two", "hash-two")["answer"].startswith("EDITED")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: needs the fields key, input, answer"),
        ('{"key": "x", "input": "y"}', "line 2: needs the fields"),
        ('{"key": "x", "input": "y", "answer": ["z"]}', "line 2: answer is no text"),
        ('{"key": 3, "input": "y", "answer": "z"}', "line 2: key is no text"),
    ],
)
def test_a_broken_line_inside_is_named(written, line, words):
    lines = written.read_text(encoding="utf-8").split("\n")
    written.write_text("\n".join([lines[0], line, *lines[2:]]), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        ledger(written)


def test_hashes_differ_by_every_part():
    assert content_hash("a", 1, {"x": 0.5}) == content_hash("a", 1, {"x": 0.5})
    assert len({content_hash("a", "bc"), content_hash("ab", "c"), content_hash("a", "b", "c"), content_hash("a")}) == 4
