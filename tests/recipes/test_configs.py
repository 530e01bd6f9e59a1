"""Every experiment file is read by its recipe's own parser and passes the recipe's own checks."""

import itertools
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from yunque import arguments

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for folder in ("recipes", "compress")
    for path in (ROOT / folder / "configs").rglob("*.yaml")
    if not path.stem.startswith("pipeline_")  # steps instead of options: tests/pipeline/test_configs.py
)


def recipe_of(config: Path) -> Path:
    """The recipe that shares most first words with the file: reward_model.py reads reward_hate_roberta_base.yaml."""
    words = {path: shared_words(path.stem, config.stem) for path in config.parents[1].glob("*.py")}
    scripts = [path for path, count in words.items() if count == max(words.values()) > 0]
    assert len(scripts) == 1, f"{config.name} should begin as the name of one recipe does"
    return scripts[0]


def shared_words(name: str, other: str) -> int:
    pairs = zip(name.split("_"), other.split("_"), strict=False)
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])


def test_there_are_configs():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_is_accepted_and_every_value_arrives(config, monkeypatch):
    parsed = {}

    def parse(*groups, **options):
        values = arguments_parse(*groups, **options)
        for group in values:
            parsed.update(vars(group))
        return values

    arguments_parse = arguments.parse
    recipe = recipe_of(config)
    monkeypatch.setattr(arguments, "parse", parse)
    monkeypatch.setattr(sys, "argv", [str(recipe), "--config", str(config)])
    # a recipe imports them once its arguments are checked
    for module in ("loading", "adapter_folders"):
        monkeypatch.setitem(sys.modules, f"yunque.models.{module}", None)
    main = runpy.run_path(str(recipe))["main"]
    with pytest.raises(ImportError, match=r"yunque\.models\.(loading|adapter_folders)"):
        main()
    wanted = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert {name: parsed[name] for name in wanted} == wanted


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_begins_with_its_purpose_and_command(config):
    text = config.read_text(encoding="utf-8")
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert recipe_of(config).name in header
    assert config.name in header
