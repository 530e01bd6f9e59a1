"""A pipeline file: steps in their order, each a script or ``yunque`` command with options that name earlier steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from yunque.distributed.profiles import profiles
from yunque.errors import InputError
from yunque.packaged import find_config, find_file

COMMANDS = ("yunque evaluate", "yunque compare")
"""What a step may run beside the scripts of ``recipes/``, ``compress/`` and ``serve/``."""

_SCRIPT_FOLDERS = ("recipes", "compress", "serve")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REFERENCE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: ``run`` with ``arguments`` and ``options``, under ``profile`` of ``launch/`` where it names one.

    Texts may hold ``{name}``: the folder of an earlier step, a variable of the file, or ``{output}``, its own folder.
    """

    name: str
    run: str
    arguments: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    profile: str | None = None
    processes: int = 1
    slurm: list[str] = field(default_factory=list)  # options of sbatch

    def __post_init__(self) -> None:
        """Check the names and types."""
        where = f"steps.{self.name}"
        if not _NAME.fullmatch(self.name) or self.name == _OUTPUT:
            raise InputError(f"{where}: is no name for a step; use small letters, digits and _, but not {_OUTPUT!r}")
        folder = Path(self.run).parts[:1]
        if self.run not in COMMANDS and not (folder and folder[0] in _SCRIPT_FOLDERS and self.run.endswith(".py")):
            known = ", ".join([f"{name}/*.py" for name in _SCRIPT_FOLDERS] + list(COMMANDS))
            raise InputError(f"{where}.run: {self.run!r} is not one of {known}")
        if self.profile is not None and self.run in COMMANDS:
            raise InputError(f"{where}.profile: {self.run} runs in one process here; leave profile out")
        for name, kind in (("arguments", list), ("options", dict), ("slurm", list), ("processes", int)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{where}.{name}: {getattr(self, name)!r} is not a {kind.__name__}")
        if self.processes < 1:
            raise InputError(f"{where}.processes: {self.processes} is not 1 or more")

    @property
    def takes_folder(self) -> bool:
        """Whether it writes one folder, which it goes on with after a stop: all but ``yunque compare``."""
        return self.run != "yunque compare"

    @property
    def makes_model(self) -> bool:
        """Whether it ends with a model folder, whose manifest is written last."""
        return self.run.startswith(("recipes/", "compress/"))

    def references(self) -> set[str]:
        """Names in braces in its arguments and options."""
        texts = [*self.arguments, *_texts(self.options)]
        return {name for text in texts for name in _REFERENCE.findall(str(text))} - {_OUTPUT}


@dataclass(frozen=True)
class Pipeline:
    """Steps in an order in which each one refers to earlier ones only; their folders lie in ``output_dir``."""

    output_dir: Path
    steps: tuple[Step, ...]
    variables: Mapping[str, str]

    def step(self, name: str) -> Step:
        """The step of that name.

        Raises:
            InputError: there is none.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise InputError(f"--step {name}: no such step; the file has {', '.join(step.name for step in self.steps)}")

    def folder(self, name: str) -> Path:
        """Where the step of that name writes."""
        return self.output_dir / name

    def needs(self, step: Step) -> list[str]:
        """The earlier steps whose folders ``step`` reads."""
        return [other.name for other in self.steps if other.name in step.references()]

    def fill(self, step: Step, value: Any, folders: Mapping[str, str] | None = None) -> Any:
        """``value`` with folders and variables put in for the names in braces, in all texts of lists and mappings."""
        names = {other.name: str(self.folder(other.name)) for other in self.steps} | dict(folders or {})
        names |= {**self.variables, _OUTPUT: names[step.name]}

        def filled(part: Any) -> Any:
            if isinstance(part, str):
                return _REFERENCE.sub(lambda match: names[match[1]], part)
            if isinstance(part, list):
                return [filled(entry) for entry in part]
            if isinstance(part, dict):
                return {key: filled(entry) for key, entry in part.items()}
            return part

        return filled(value)


def read_pipeline(
    path: str | Path, output_dir: str | None = None, variables: Mapping[str, str] | None = None
) -> Pipeline:
    """Read and check a pipeline file; ``output_dir`` and ``variables`` win over its own.

    Raises:
        InputError: not a YAML mapping, an unknown or missing key, a script or profile that does not exist, a step that
            refers to a later one or to nothing.
    """
    try:
        content = yaml.safe_load(find_config(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("steps"), dict) or not content["steps"]:
        raise InputError(f"--config {path}: has no steps; give `steps:` with a mapping of names to steps")
    if unknown := sorted(map(str, content.keys() - {"output_dir", "variables", "steps"})):
        raise InputError(f"--config {path}: unknown key {unknown[0]}; it may hold output_dir, variables and steps")
    folder = output_dir or content.get("output_dir")
    if not folder:
        raise InputError(f"--config {path}: output_dir: is missing; give the folder of the whole run")
    known = {str(name): str(value) for name, value in (content.get("variables") or {}).items()}
    if stranger := sorted((variables or {}).keys() - known.keys()):
        raise InputError(f"--set {stranger[0]}: the file has no such variable; it has {', '.join(known) or 'none'}")
    pipeline = Pipeline(
        Path(folder),
        tuple(_step(name, entry) for name, entry in content["steps"].items()),
        known | dict(variables or {}),
    )
    _check(pipeline)
    return pipeline


def _step(name: object, entry: object) -> Step:
    if not isinstance(entry, dict) or "run" not in entry:
        raise InputError(f"steps.{name}: is no mapping with `run:`, the script or command of the step")
    allowed = {field.name for field in fields(Step)} - {"name"}
    if unknown := sorted(map(str, entry.keys() - allowed)):
        raise InputError(f"steps.{name}: unknown key {unknown[0]}; a step may hold {', '.join(sorted(allowed))}")
    return Step(name=str(name), **entry)


def _check(pipeline: Pipeline) -> None:
    earlier: set[str] = set()
    for step in pipeline.steps:
        where = f"steps.{step.name}"
        if clash := {step.name} & pipeline.variables.keys():
            raise InputError(f"{where}: a variable has the name {clash.pop()}, too; rename one of them")
        if strange := sorted(step.references() - earlier - pipeline.variables.keys()):
            raise InputError(f"{where}: {{{strange[0]}}} is neither an earlier step nor a variable")
        if step.run not in COMMANDS and not find_file(step.run).is_file():
            raise InputError(f"{where}.run: {step.run}: no such script; start from the repository's root")
        if step.profile is not None and step.profile not in profiles():
            raise InputError(f"{where}.profile: launch/{step.profile}.yaml: no such file")
        config = step.options.get("config")
        if config is not None and not find_config(pipeline.fill(step, config)).is_file():
            raise InputError(f"{where}.options.config: {config}: no such file")
        earlier.add(step.name)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, str):
        yield value
