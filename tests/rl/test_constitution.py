from pathlib import Path

import numpy as np
import pytest
import yaml

from yunque.errors import InputError
from yunque.rl.constitution import fill, read_constitution

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "constitutions").glob("*.yaml"))


def principle(name="p", priority=1, **changed):
    row = {
        "id": name,
        "priority": priority,
        "critique_request": "Say what is wrong.",
        "revision_request": "Mend it.",
        "preference_question": "Which is better?",
    } | changed
    return {key: value for key, value in row.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        path = tmp_path / "constitution.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True))
        return path

    return to_file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_constitutions_are_read(path):
    constitution = read_constitution(path)
    assert len(constitution.principles) >= 3
    assert len(constitution.levels) >= 2


def test_principles_come_by_priority_and_equals_by_chance(write):
    rows = [principle("last", 3), principle("one"), principle("two"), principle("middle", 2)]
    constitution = read_constitution(write({"principles": rows}))
    assert [[one.id for one in level] for level in constitution.levels] == [["one", "two"], ["middle"], ["last"]]
    drawn = [[one.id for one in constitution.draw(np.random.default_rng(seed), 3)] for seed in range(20)]
    assert {names[2] for names in drawn} == {"middle"}
    assert {names[0] for names in drawn} == {"one", "two"}


def test_the_hash_is_of_the_content_not_of_the_layout(write):
    one = read_constitution(write({"principles": [principle()]})).sha256
    again = read_constitution(write("# a remark\n" + yaml.safe_dump({"principles": [principle()]}))).sha256
    other = read_constitution(write({"principles": [principle(priority=2)]})).sha256
    assert one == again != other


def test_braces_in_texts_stay():
    assert fill("{{x}} {prompt} {request}", prompt="{request}", request="{0}") == "{x} {request} {0}"


BAD = [
    ("", "no mapping"),
    ("principles: [", "not valid YAML"),
    ("- a", "no mapping"),
    ({}, "no principles"),
    ({"principles": []}, "no principles"),
    ({"principles": "be good"}, "no principles"),
    ({"principles": ["be good"]}, "principle 1 is no mapping"),
    ({"principles": [principle(), principle()]}, "id p for two principles"),
    ({"principles": [principle(priority=0)]}, "priority 0"),
    ({"principles": [principle(priority=True)]}, "priority True"),
    ({"principles": [principle(priority=None)]}, "priority None"),
    ({"principles": [principle(revision_request=None)]}, "revision_request is missing"),
    ({"principles": [principle(critique_request=" ")]}, "critique_request is missing"),
    ({"principles": [principle(name=7)]}, "id is missing or no text"),
    ({"principles": [principle(weight=2)]}, "unknown key weight"),
    ({"principles": [principle()], "rules": []}, "unknown key rules"),
    ({"principles": [principle()], "frames": {"answer": "no name"}}, "frame answer: needs {prompt}"),
    ({"principles": [principle()], "frames": {"critique": "{prompt}{answer}{request}{x}"}}, "frame critique: needs"),
    ({"principles": [principle()], "frames": {"answer": "{prompt} }"}}, "write a lone brace twice"),
    ({"principles": [principle()], "frames": {"answer": 3}}, "frame answer"),
    ({"principles": [principle()], "frames": ["a"]}, "frames is no mapping"),
    ({"principles": [principle()], "frames": {"judge": "x"}}, "unknown key judge"),
]


@pytest.mark.parametrize(("content", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_file_is_refused_by_name(write, content, words):
    with pytest.raises(InputError) as error:
        read_constitution(write(content))
    assert words in str(error.value)
    assert str(error.value).startswith("constitution: ")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_constitution(tmp_path / "none.yaml")
