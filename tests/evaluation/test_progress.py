"""Finished batches on the disk: torn lines, other ranks, another run."""

import pytest

from yunque.evaluation.progress import Progress, differing


@pytest.fixture
def progress(tmp_path):
    made = Progress(tmp_path / "answers", {"seed": 0, "shape": (1, 2)})
    made.begin()
    with made.writer(0) as file:
        for number in (4, 2):
            file.append({"batch": number, "rows": [number]})
    return made


def test_a_torn_line_is_not_counted_and_is_overwritten(progress):
    path = progress.folder / "rank-0000.jsonl"
    with path.open("ab") as file:
        file.write(b'{"batch": 7, "ro')
    assert set(progress.records()) == {2, 4}
    with progress.writer(0) as file:
        file.append({"batch": 9, "rows": ["é\u2028"]})
    assert progress.records()[9]["rows"] == ["é\u2028"]
    assert path.read_bytes().count(b"\n") == 3


def test_a_file_of_one_torn_line_is_empty(progress):
    (progress.folder / "rank-0003.jsonl").write_bytes(b'{"batch"')
    with progress.writer(3) as file:
        file.append({"batch": 1})
    assert set(progress.records()) == {1, 2, 4}


def test_batches_of_all_ranks_count(progress):
    with progress.writer(1) as file:
        file.append({"batch": 0})
    assert set(progress.records()) == {0, 2, 4}


def test_another_run_is_told_by_what_differs(progress):
    assert progress.differences() == []
    other = Progress(progress.folder, {"seed": 1, "shape": [1, 2]})
    assert other.differences() == ["seed (0 there, 1 here)"]
    assert differing({"a": 1}, {"b": "x" * 50}) == ["a (1 there, null here)", f'b (null there, "{"x" * 38}… here)']
    progress.remove()
    assert other.differences() == []
    assert other.records() == {}
