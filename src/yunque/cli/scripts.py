"""``yunque ppo-detox`` and the other scripts as commands, and ``yunque init``, which copies them for editing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from yunque.errors import InputError
from yunque.packaged import FOLDERS, SCRIPTS, find_script, packaged_folder

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The script parses its own options, ``--help`` and ``--config`` among them."""

LAUNCH_OPTIONS = ("--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port")

_LAUNCH_HELP = f"""
launch options:
  --profile NAME        start it with Accelerate: a file of launch/ (cpu, ddp, fsdp2, zero3, ...) or a path
  {", ".join(LAUNCH_OPTIONS)}
                        of accelerate launch"""

_PURPOSES = {
    "finetune": "Fine-tune a model: all weights, LoRA, QLoRA or prompt tuning.",
    "reward-model": "Train a reward model on pairs, or a classifier on labels.",
    "ppo-detox": "Detoxify a model with PPO: a hate-speech classifier is the reward.",
    "ppo-sentiment": "Let a model continue reviews in a wanted sentiment, with PPO.",
    "grpo-detox": "Detoxify a model with GRPO or RLOO.",
    "dpo": "Align a model with preference pairs (DPO, IPO, hinge).",
    "orpo": "Align a model with preference pairs while it is fine-tuned (ORPO).",
    "constitutional": "Write training data by critique, revision and AI feedback.",
    "distill": "Distil a teacher into a student.",
    "prune": "Prune heads, neurons and layers.",
    "quantize": "Quantize to int8 or 4 bits, with a gate on what was kept.",
    "export": "Export to ONNX and prove that the outputs are the same.",
    "pipeline": "Run every step of a pipeline file that is not done.",
}


def script_commands() -> dict[str, Callable[[typer.Context], None]]:
    """A command for each of SCRIPTS, by name."""
    return {name: _command(name) for name in SCRIPTS}


def _command(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        run_script(name, context.args)

    command.__name__ = name.replace("-", "_")
    command.__doc__ = f"{_PURPOSES[name]} (--help lists all options)"
    return command


class ScriptCommand(TyperCommand):
    """Completes the options of a script, and the names of launch profiles."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """What may follow, of what begins with ``incomplete``."""
        from click.shell_completion import CompletionItem

        from yunque.distributed.profiles import profiles

        words = [*ctx.args, *ctx.params.get("args", [])]
        if words and words[-1] == "--profile":
            names = list(profiles())
        elif incomplete.startswith("-"):
            names = ["--profile", *LAUNCH_OPTIONS, "--config", "--help", *_option_names(ctx.info_name or "")]
        else:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _option_names(command: str) -> list[str]:
    """Options of a script; those of ``pipeline`` are not dataclasses."""
    from dataclasses import fields

    groups = getattr(_load(find_script(command)), "GROUPS", ())
    return [f"--{field.name}" for group in groups for field in fields(group) if field.init]


def run_script(name: str, argv: Sequence[str]) -> None:
    """Run a script in this process, or under the launch profile that ``argv`` names; ends as the script ends.

    Raises:
        InputError: launch options without a profile, or a profile that does not exist.
    """
    launch, rest = _launch_options(argv)
    script = find_script(name)
    if "--profile" in launch and not {"--help", "-h"} & {*rest}:
        from yunque.distributed.profiles import find_profile

        words = ["-m", "yunque.distributed.launch", "--config_file", str(find_profile(launch.pop("--profile")))]
        words += [word for option in launch.items() for word in option]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *words, str(script), *rest])
    if launch and "--profile" not in launch:
        raise InputError(f"{next(iter(launch))}: wants a launch profile; add --profile NAME, such as ddp or fsdp2")
    sys.argv = [f"yunque {name}", *rest]
    try:
        _load(script).main()
    except SystemExit as end:
        if not end.code and {"--help", "-h"} & {*rest}:
            print(_LAUNCH_HELP)
        raise


def _load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"yunque_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their types
    spec.loader.exec_module(module)
    return module


def _launch_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """``--profile`` and LAUNCH_OPTIONS with their values, and all other words."""
    found: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in ("--profile", *LAUNCH_OPTIONS):
            rest.append(word)
            continue
        found[option] = value if equals else next(words, "")
        if not found[option] or found[option].startswith("--"):
            raise InputError(f"{option}: give a value")
    return found, rest


def init(
    folder: Annotated[Path, typer.Argument(help="A new folder, or one without any of these folders.")],
) -> None:
    """Copy scripts, their YAMLs, launch profiles, deployment files and Slurm jobs into a folder, for editing."""
    there = [name for name in FOLDERS if (folder / name).exists()]
    if folder.is_file() or there:
        raise InputError(f"{folder}: {f'has {there[0]}/ already' if there else 'is a file'}; give another folder")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(packaged_folder(name), folder / name, ignore=ignore)
    print(
        f"{folder}: {', '.join(f'{name}/' for name in FOLDERS)}; go there and start\n"
        "  accelerate launch --config_file launch/cpu.yaml recipes/ppo_detox.py"
    )
