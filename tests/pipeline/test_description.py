"""Pipeline files: what they may say, and what is said of those that may not."""

import pytest
from pipelines import step

from yunque.errors import InputError
from yunque.pipeline.description import read_pipeline


def test_texts_are_filled_with_folders_variables_and_the_own_folder(write):
    path = write(
        {"a": step(text="{seed}"), "b": step(parent="{a}/sub", text=["{output}", {"deep": "{seed}"}])},
        variables={"seed": 3},
    )
    pipeline = read_pipeline(path, variables={"seed": "4"})
    assert pipeline.fill(pipeline.step("a"), pipeline.step("a").options) == {"text": "4"}
    assert pipeline.fill(pipeline.step("b"), pipeline.step("b").options) == {
        "parent": "out/a/sub",
        "text": ["out/b", {"deep": "4"}],
    }
    assert pipeline.needs(pipeline.step("b")) == ["a"]
    assert read_pipeline(path, output_dir="else").folder("a").as_posix() == "else/a"


@pytest.mark.parametrize(
    ("steps", "more", "message"),
    [
        ({}, {}, "has no steps"),
        ({"a": {"options": {}}}, {}, r"steps\.a: is no mapping with `run:`"),
        ({"A b": step()}, {}, "no name for a step"),
        ({"output": step()}, {}, "no name for a step"),
        ({"a": {"run": "recipes/none.py"}}, {}, r"recipes/none\.py: no such script"),
        ({"a": {"run": "rm"}}, {}, "'rm' is not one of recipes"),
        ({"a": {"run": "../recipes/step.py"}}, {}, "is not one of recipes"),
        ({"a": step() | {"profil": "ddp"}}, {}, "unknown key profil"),
        ({"a": step() | {"profile": "none"}}, {}, r"launch/none\.yaml: no such file"),
        ({"a": {"run": "yunque compare", "profile": "ddp"}}, {}, "one process"),
        ({"a": step() | {"processes": 0}}, {}, "0 is not 1 or more"),
        ({"a": step() | {"arguments": "x"}}, {}, "'x' is not a list"),
        ({"a": step(parent="{b}"), "b": step()}, {}, r"\{b\} is neither an earlier step"),
        ({"a": step(parent="{a}")}, {}, r"\{a\} is neither an earlier step"),
        ({"a": step(config="none.yaml")}, {}, r"none\.yaml: no such file"),
        ({"a": step()}, {"seed": 1}, "unknown key seed"),
        ({"a": step()}, {"output_dir": None}, "output_dir: is missing"),
        ({"a": step()}, {"variables": {"a": 1}}, "variable has the name a"),
    ],
)
def test_a_mistake_is_named(write, steps, more, message):
    with pytest.raises(InputError, match=message):
        read_pipeline(write(steps, **more))


def test_unknown_variables_files_and_yaml_are_named(write, tmp_path):
    with pytest.raises(InputError, match="no such variable; it has seed"):
        read_pipeline(write({"a": step()}, variables={"seed": 0}), variables={"sed": "1"})
    with pytest.raises(InputError, match="No such file"):
        read_pipeline(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        read_pipeline(tmp_path / "bad.yaml")
