"""Scripts, configurations, profiles, deployment, Slurm jobs: at the top of a checkout, in the package of a wheel."""

from __future__ import annotations

from pathlib import Path

from yunque.errors import InputError

FOLDERS = ("recipes", "compress", "launch", "serve", "slurm")

SCRIPTS = {
    "finetune": "recipes/finetune.py",
    "reward-model": "recipes/reward_model.py",
    "ppo-detox": "recipes/ppo_detox.py",
    "ppo-sentiment": "recipes/ppo_sentiment.py",
    "grpo-detox": "recipes/grpo_detox.py",
    "dpo": "recipes/dpo.py",
    "orpo": "recipes/orpo.py",
    "constitutional": "recipes/constitutional.py",
    "distill": "compress/distill.py",
    "prune": "compress/prune.py",
    "quantize": "compress/quantize.py",
    "export": "compress/to_onnx.py",
    "pipeline": "compress/pipeline.py",
}
"""Names of the scripts as subcommands of ``yunque``."""


def packaged_folder(name: str) -> Path:
    """Where this installation keeps the folder ``name`` of FOLDERS."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parents[1] / name


def find_file(name: str | Path) -> Path:
    """The file of that path or, where there is none, the packaged one: ``recipes/finetune.py`` from any folder."""
    path = Path(name)
    if not path.exists() and path.parts[:1] and path.parts[0] in FOLDERS:
        packaged = packaged_folder(path.parts[0]).joinpath(*path.parts[1:])
        return packaged if packaged.is_file() else path
    return path


def find_script(name: str) -> Path:
    """The script of a subcommand (``ppo-detox``) or of a path.

    Raises:
        InputError: there is neither.
    """
    path = find_file(SCRIPTS.get(name, name))
    if not path.is_file():
        raise InputError(f"script: {name} is no file; give a recipe, such as recipes/finetune.py or finetune")
    return path


def find_config(name: str | Path) -> Path:
    """The YAML file of that path, or the packaged one of that path or name (``ppo_detox_flan_t5_base``)."""
    path = find_file(name)
    if not path.exists() and len(path.parts) == 1:
        named = Path(path.name.removesuffix(".yaml") + ".yaml")
        for folder in FOLDERS[:2]:
            if (packaged := packaged_folder(folder) / "configs" / named).is_file():
                return packaged
    return path
