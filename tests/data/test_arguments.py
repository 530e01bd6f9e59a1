from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from yunque.arguments import parse
from yunque.data.arguments import DataArguments, LabelledDataArguments
from yunque.errors import InputError


@pytest.mark.parametrize(
    ("values", "option", "fix"),
    [
        ({"prompt_template": "Summarize:"}, "prompt_template", "must hold {text} once"),
        ({"prompt_template": "{text} {text}"}, "prompt_template", "must hold {text} once"),
        ({"test_size": 0.0}, "test_size", "between 0 and 1"),
        ({"test_size": 1.0}, "test_size", "between 0 and 1"),
        ({"test_size": "tenth"}, "test_size", "between 0 and 1"),
        ({"min_text_chars": 300, "max_text_chars": 200}, "min_text_chars", "max_text_chars=200"),
        ({"min_prompt_tokens": 9, "max_prompt_tokens": 8}, "min_prompt_tokens", "max_prompt_tokens=8"),
        ({"min_text_chars": 0}, "min_text_chars", "at least 1"),
        ({"max_prompt_tokens": -1}, "max_prompt_tokens", "at least 1"),
        ({"max_prompt_length": 0}, "max_prompt_length", "at least 1"),
        ({"max_train_samples": 0}, "max_train_samples", "at least 1"),
        ({"max_test_samples": 2.5}, "max_test_samples", "whole number"),
        ({"train_split": "train[:100]"}, "train_split", "max_train_samples"),
        ({"test_split": "train"}, "test_split", "name another one"),
    ],
)
def test_bad_value_names_the_option_and_the_fix(values, option, fix):
    with pytest.raises(InputError) as caught:
        DataArguments(**values)
    assert str(caught.value).startswith(f"{option}: ")
    assert fix in str(caught.value)


def test_equal_limits_are_fine():
    assert DataArguments(min_text_chars=5, max_text_chars=5).max_text_chars == 5


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"label_names": ["hate"]}, "label_names"),
        ({"label_names": ["hate", "hate"]}, "label_names"),
        ({"label_values": ["hateful"]}, "label_values"),
        ({"label_values": ["hateful", "hateful"]}, "label_values"),
        ({"max_test_samples": 0}, "max_test_samples"),
    ],
)
def test_bad_labels_name_the_option(values, option):
    with pytest.raises(InputError, match=f"^{option}: "):
        LabelledDataArguments(**values)


def test_options_come_from_yaml_and_command_line(tmp_path: Path):
    config = tmp_path / "experiment.yaml"
    config.write_text("dataset_name: here\nlabel_names: [good, bad]\nlabel_values: [0, 1]\nmax_train_samples: 7\n")
    (args,) = parse(LabelledDataArguments, argv=["--config", str(config), "--max_train_samples", "5"])
    assert (args.dataset_name, args.label_values, args.max_train_samples) == ("here", ["0", "1"], 5)


def test_every_option_has_help():
    for group in (DataArguments, LabelledDataArguments):
        assert all(field.metadata.get("help") for field in group.__dataclass_fields__.values())


def test_import_is_light():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'datasets', 'numpy'], None))\n"
        "import yunque.data.arguments"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
