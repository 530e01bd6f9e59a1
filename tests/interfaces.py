"""The real command lines of the project's scripts and subcommands, asked in this process without running them."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import re
import runpy
import sys
from pathlib import Path

import generate_reference
import pytest
import typer
import yaml
from documents import ROOT

from yunque import arguments, packaged
from yunque.cli import app, scripts
from yunque.distributed.profiles import find_profile
from yunque.errors import InputError
from yunque.serving import settings

_ADDS_OPTIONS = ("add_argument", "option")
PLACEHOLDER = re.compile(r"\.\.\.|…|.*\.\.\..*")


class Parsed(Exception):
    """The options were taken; the work would begin now."""


class Unknown(Exception):
    """A command that its program would refuse, and why."""


def check(words: list[str]) -> None:
    """Ask the program of a command whether it would take its words.

    Raises:
        Unknown: it would not.
    """
    program, rest = words[0].rpartition("/")[2], words[1:]
    if program in ("srun", "sbatch"):
        _within(rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        _all_known([word for word in rest if "=" not in word and not word.startswith("-")], targets, "make")
    elif program == "pytest":
        _exist([word.partition("::")[0] for word in rest if word.startswith("tests")])
    elif program == "accelerate":
        _accelerate(rest)
    elif program == "yunque":
        _yunque(rest)
    elif program == "python":
        _python(rest)
    elif program == "submit.sh":
        _submit(rest)
    else:
        _exist([words[0]])
        if program.endswith(".py"):
            _script(words[0], rest)


def _python(rest: list[str]) -> None:
    if rest[:1] == ["-m"]:
        if rest[1] == "yunque":
            _yunque(rest[2:])
        elif rest[1] == "pytest":
            check(rest[1:])
        elif rest[1] in ("yunque.distributed.launch", "accelerate.commands.launch"):
            _accelerate(["launch", *rest[2:]])
    elif rest and rest[0].endswith(".py"):
        check(rest)


def _within(words: list[str]) -> None:
    """The command that another one starts, after its options."""
    place = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    if words[place:]:
        check(words[place:])


def _exist(paths: list[str]) -> None:
    for path in paths:
        if not PLACEHOLDER.fullmatch(path) and not (ROOT / path).exists():
            raise Unknown(f"there is no {path}")


def _all_known(words: list[str], known: list[str] | set[str], what: str) -> None:
    for word in words:
        if word not in known:
            raise Unknown(f"{what} knows no {word}")


@functools.cache
def _launch_parser():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def _accelerate(rest: list[str]) -> None:
    if rest[:1] != ["launch"]:
        raise Unknown("only accelerate launch is ours")
    words = ["0" if word in ("N", "RANK") else word for word in rest[1:]]
    with _refused():
        args = _launch_parser().parse_args(words)
    _exist([args.config_file] if args.config_file else [])
    _python([*(["-m"] if args.module else []), args.training_script, *args.training_script_args])


@contextlib.contextmanager
def _refused():
    """Turn an argparse parser's exit into Unknown."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except SystemExit as left:
            if left.code:
                raise Unknown(said.getvalue().strip().splitlines()[-1]) from None


def _submit(rest: list[str]) -> None:
    jobs = {path.stem for path in (ROOT / "slurm").glob("*.sbatch")}
    place = next((place for place, word in enumerate(rest) if word in jobs), None)
    if place is None:
        raise Unknown(f"slurm/submit.sh: no job of {sorted(jobs)} is named")
    job, words = rest[place], rest[place + 1 :]
    if "--profile" in words:
        at = words.index("--profile")
        _exist([f"launch/{words[at + 1]}.yaml"])
        del words[at : at + 2]
    if job == "compress":
        job, words = f"compress/{words[0]}", words[1:]
    folder = "" if "/" in job else "recipes/"
    if (ROOT / f"{folder}{job}.py").exists():
        _script(f"{folder}{job}.py", words)


def _yunque(rest: list[str]) -> None:
    command = typer.main.get_command(app)
    names = []
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        _all_known(rest[:1], set(command.commands), f"yunque {' '.join(names)}".strip())
        names.append(rest[0])
        command, rest = command.commands[rest[0]], rest[1:]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    if names and names[0] in packaged.SCRIPTS:
        with _as_unknown(f"yunque {names[0]}"):
            launch, words = scripts._launch_options(rest)
            if "--profile" in launch and not PLACEHOLDER.fullmatch(launch["--profile"]):
                find_profile(launch["--profile"])
        _script(packaged.SCRIPTS[names[0]], words)
    elif names[:1] == ["rehearse"]:
        _rehearse(rest, command)
    elif names == ["serve"]:
        with _as_unknown("yunque serve"):
            settings.parser("yunque serve").parse_args(rest)
    elif command.context_settings.get("ignore_unknown_options"):
        words = _concrete(rest)
        _run(lambda: app([*names, *words], standalone_mode=False), names, elided=words != rest)
    else:
        _all_known([word.partition("=")[0] for word in rest if word.startswith("--")], options, " ".join(names))


@contextlib.contextmanager
def _as_unknown(program: str):
    try:
        yield
    except InputError as error:
        raise Unknown(f"{program}: {error}") from error


def _rehearse(rest: list[str], command) -> None:
    words = [word for word in rest if not PLACEHOLDER.fullmatch(word)]
    own = {option: parameter for parameter in command.params for option in parameter.opts}
    given, place = [], 0
    while place < len(words):
        parameter = own.get(words[place])
        if parameter is None or not words[place].startswith("--"):
            given.append(words[place])
            place += 1
        else:
            place += 1 if getattr(parameter, "is_flag", False) else 2
    if len(given) < 2:
        return
    profile, script, *options = given
    _exist([profile if profile.endswith(".yaml") else f"launch/{profile}.yaml"] if profile.islower() else [])
    if script.endswith(".py"):
        _script(script, options)


def _concrete(words: list[str]) -> list[str]:
    """Words without what the reader is to fill in: an option goes with its placeholder."""
    kept: list[str] = []
    for word in words:
        if PLACEHOLDER.fullmatch(word) and kept and kept[-1].startswith("--"):
            kept.pop()
        elif word not in ("...", "…"):
            kept.append(word)
    return kept


def _script(path: str, words: list[str]) -> None:
    """Ask a script of ours."""
    _exist([path])
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    added = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    added = [node for node in added if getattr(node.func, "attr", getattr(node.func, "id", "")) in _ADDS_OPTIONS]
    flags = {argument.value for node in added for argument in node.args if isinstance(argument, ast.Constant)}
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    if flags:
        _all_known(given, flags, path)
    elif not path.startswith("tests/"):
        kept = _concrete(words)
        _run(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"), [path, *kept], elided=kept != words)
    elif len(words) > 1:
        check(words)  # a test's program that runs a command


def _run(program, argv: list[str], *, elided: bool) -> None:
    """Let a program parse its words, and stop it there; where some are left out, only unknown options are wrong."""
    parse = arguments.parse

    def parse_only(*groups, **options):
        if elided:
            given = [word[2:].partition("=")[0] for word in options.get("argv") or argv[1:] if word.startswith("--")]
            names = {name for group in groups for name in group.__dataclass_fields__} | {"config", "help"}
            _all_known([name.removeprefix("no_") for name in given], names, argv[0])
        else:
            parse(*groups, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(arguments, "parse", parse_only)
        patch.setattr(sys, "argv", argv)
        patch.chdir(ROOT)
        patch.setattr(sys, "stdout", io.StringIO())
        with contextlib.suppress(Parsed):
            try:
                program()
            except SystemExit as left:
                if left.code and not elided:
                    raise Unknown(f"{argv[0]}: {said.getvalue().strip()[-300:]}") from None
            except (InputError, OSError) as error:
                raise Unknown(f"{argv[0]}: {error}") from error


@functools.cache
def known_keys() -> frozenset[str]:
    """Options of all recipes, compress scripts and the server, which YAML files may set."""
    found = {
        name
        for script in generate_reference.scripts()
        for group in script.groups
        for name in group.__dataclass_fields__
    }
    found |= {"steps", "variables"}  # of a pipeline, whose steps have the options of the others
    return frozenset(found | settings.ServerSettings.model_fields.keys())


def check_yaml(text: str) -> None:
    """Check that a block is YAML whose keys an experiment or a matrix has.

    Raises:
        Unknown: it is not.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Unknown(f"not YAML: {error}") from error
    if not isinstance(content, dict):
        raise Unknown("not a mapping")
    matrix = {"axes", "base", "baseline", "errors", "evaluate", "gates"}
    _all_known([str(key) for key in content], known_keys() | matrix, "no recipe or matrix")


def check_python(text: str) -> None:
    """Check that a block compiles and that what it imports of ours is there.

    Raises:
        Unknown: it does not, or is not.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Unknown(f"not Python: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("yunque"):
            for alias in node.names:
                _importable(node.module, alias.name)


def _importable(module: str, name: str) -> None:
    """Look into the module's source: importing it may take seconds."""
    base = Path(ROOT, "src", *module.split("."))
    if base.joinpath(name).is_dir() or base.joinpath(f"{name}.py").is_file():
        return
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not source.is_file() or not re.search(rf"\b{re.escape(name)}\b", source.read_text(encoding="utf-8")):
        raise Unknown(f"{module} has no {name}")


os.environ.setdefault("COLUMNS", "200")
