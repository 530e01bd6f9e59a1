"""The command line and the YAML file of scripts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from yunque.arguments import parse
from yunque.errors import InputError


@dataclass
class Model:
    model_name_or_path: str = field(default="embedded", metadata={"help": "Model."})


@dataclass
class Training:
    learning_rate: float = field(default=1e-5, metadata={"help": "Step size."})
    max_steps: int = field(default=10, metadata={"help": "Number of steps."})
    resume: bool = field(default=False, metadata={"help": "Continue."})
    warmup: float = field(default=0.0, metadata={"help": "Fraction of the steps, 5 % / 100, %d."})
    targets: list[str] = field(default_factory=list, metadata={"help": "Layers."})
    penalty: Literal["k1", "k3"] = field(default="k1", metadata={"help": "Estimator."})
    seed: int | None = field(default=None, metadata={"help": "Seed."})

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise InputError(f"--max_steps {self.max_steps}: give at least 1")


def config_file(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_then_yaml_then_command_line(tmp_path):
    config = config_file(tmp_path, "learning_rate: 2.0e-5\nmax_steps: 20\nmodel_name_or_path: t5\n")
    for option in (["--config", config], [f"--config={config}"]):
        model, training = parse(Model, Training, argv=["--max_steps", "30", *option])
        assert (model.model_name_or_path, training.learning_rate, training.max_steps) == ("t5", 2e-5, 30)
        assert training.resume is False


def test_same_arguments_without_a_file():
    model, training = parse(Model, Training, argv=["--model_name_or_path", "t5", "--resume"])
    assert (model, training) == (Model("t5"), Training(resume=True))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_step", "3"], ["--max_step", "--help"]),
        (["--max_steps", "three"], ["--max_steps", "three"]),
        (["--max_steps", "0"], ["--max_steps 0", "at least 1"]),
        (["--max_steps"], ["--max_steps"]),
        (["--config"], ["--config", "path"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml", "No such file"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_command_line_names_the_option(argv, words):
    with pytest.raises(InputError) as error:
        parse(Model, Training, argv=argv)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1.0e-5\n", ["config.yaml", "unknown key learning_rat"]),
        ("max_steps: [1\n", ["config.yaml", "not valid YAML"]),
        ("- max_steps\n", ["config.yaml", "mapping"]),
        ("", ["config.yaml", "mapping"]),
        ("max_steps: 0\n", ["--max_steps 0", "at least 1"]),
        ("max_steps: many\n", ["--max_steps", "int", "many"]),
        ("max_steps: 1.5\n", ["--max_steps", "int", "1.5"]),
        ("max_steps: true\n", ["--max_steps", "int", "True"]),
        ("max_steps: [1, 2]\n", ["--max_steps", "one value", "[1, 2]"]),
        ("max_steps: {a: 1}\n", ["--max_steps", "int"]),
        ("resume: 3\n", ["--resume", "3"]),
        ("penalty: k9\n", ["--penalty", "k9", "k1"]),
        ("targets: q\n", ["--targets", "a list"]),
    ],
)
def test_bad_yaml_names_the_key(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        parse(Model, Training, argv=["--config", config_file(tmp_path, text)])
    assert all(word in str(error.value) for word in words), error.value


def test_yaml_values_become_what_the_command_line_s_would(tmp_path):
    text = "learning_rate: 1e-5\nwarmup: 1\nresume: true\ntargets: [q, v]\npenalty: k3\nseed: null\n"
    _, training = parse(Model, Training, argv=["--config", config_file(tmp_path, text)])
    assert training == Training(learning_rate=1e-5, warmup=1.0, resume=True, targets=["q", "v"], penalty="k3")
    assert type(training.warmup) is float


def test_default_config_steps_aside_for_a_config_or_a_model(tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("max_steps: 7\n")
    other = config_file(tmp_path, "learning_rate: 0.5\n")

    def max_steps(*argv: str) -> int:
        return parse(Model, Training, default_config=default, argv=argv)[1].max_steps

    assert max_steps() == 7
    assert max_steps("--max_steps", "8") == 8
    assert max_steps("--learning_rate", "0.1") == 7
    assert max_steps("--config", other) == max_steps(f"--config={other}") == Training.max_steps
    assert max_steps("--model_name_or_path", "t5") == max_steps("--model_name_or_path=t5") == Training.max_steps


def test_a_per_cent_sign_in_a_help_text_is_plain(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Model, Training, argv=["--help"])
    assert stopped.value.code == 0
    assert "Fraction of the steps, 5 % / 100, %d. (default: 0.0)" in " ".join(capsys.readouterr().out.split())
