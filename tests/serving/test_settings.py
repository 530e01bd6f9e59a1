from pathlib import Path

import pytest

from yunque.errors import InputError
from yunque.serving.settings import ServerSettings, parse_settings


def parsed(*argv):
    return parse_settings(argv, "serve")


def test_models_by_name_and_by_folder():
    settings = parsed("out/onnx", "int8=out/q8", "--model_name_or_path", "my model", "--port", "0")
    assert settings.models == {"my-model": Path("my model"), "onnx": Path("out/onnx"), "int8": Path("out/q8")}
    assert next(iter(settings.models)) == "my-model"
    assert settings.port == 0


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("models: {a: x, b: y}\nport: 81\nmax_queued: 7\nallowed_hosts: [me]\nplayground: true\n")
    settings = parsed("--config", str(config), "--port", "82", "--no-playground", "--folders", "next=z")
    assert (settings.port, settings.max_queued, settings.playground) == (82, 7, False)
    assert settings.models == {"a": Path("x"), "b": Path("y")}
    assert settings.folders == {"next": Path("z")}
    assert settings.allowed_hosts == ["me"]
    assert parsed("c=w", "--config", str(config)).models == {"c": Path("w")}
    assert settings.max_body_bytes == ServerSettings.model_fields["max_body_bytes"].default


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "models: give at least one"),
        (["m", "--port", "http"], "port: "),
        (["m", "--port", "70000"], "port: "),
        (["m", "--timeout_s", "nan"], "timeout_s: "),
        (["m", "--timeout_s", "0"], "timeout_s: "),
        (["m", "--prot", "1"], "unrecognized arguments: --prot"),
        (["m", "--verify", "maybe"], "verify"),
        (["a=x", "a=y"], "two models are called a"),
        (["a/b=x"], "no name for a model"),
        (["=x"], "no name for a model"),
        (["m", "--config", "nowhere.yaml"], "No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argv, words):
    with pytest.raises(InputError, match=words) as error:
        parsed(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [("models: {m: x}\nprot: 1", "unknown key prot"), ("[1]", "mapping"), ("a: [", "not valid YAML"), ("\0", "YAML")],
)
def test_wrong_files(tmp_path, content, words):
    config = tmp_path / "serve.yaml"
    config.write_text(content)
    with pytest.raises(InputError, match=words):
        parsed("--config", str(config))
