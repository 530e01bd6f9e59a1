"""Where rewards come from: Python functions and model folders, named by the options."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter
from yunque.models.loading import load_classifier
from yunque.rl.config import RewardArguments
from yunque.rl.rewards import (
    NO_COLUMNS,
    REWARD_MODEL,
    ClassifierReward,
    ClassifierScorer,
    Columns,
    LabelScore,
    Scorer,
    WeightedReward,
)

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_OPTION = "reward_funcs"
_SHOWN_CHARS = 60  # of a response in an error


def load_reward(args: RewardArguments, adapter: ModelAdapter, device: torch.device) -> WeightedReward:
    """Load every model and function that ``args`` names.

    Raises:
        InputError: there is no reward at all; a model, label, module or function is not to be had.
    """
    name, functions = args.reward_model_name_or_path, args.reward_funcs or []
    if name is None and not functions:
        raise InputError("reward_model_name_or_path: give a classifier or reward model, or reward_funcs")

    def scorer(model: str, option: str) -> ClassifierScorer:
        place = torch.device(args.reward_device or device)
        return ClassifierScorer(*load_classifier(model, option), batch_size=args.reward_batch_size, device=place)

    def further(source: str) -> Scorer:
        if is_function(source):
            return FunctionScore(source)
        model, _, label = source.partition("#")
        return LabelScore(scorer(model, _OPTION), adapter, args, label=label or args.reward_label, option=_OPTION)

    reward_model = None
    if name is not None:
        reward_model = ClassifierReward(scorer(name, "reward_model_name_or_path"), adapter, args)
    watch = None
    if args.watch_model_name_or_path is not None:
        watched, label = args.watch_model_name_or_path, args.watch_label or args.reward_label
        unseen = scorer(watched, "watch_model_name_or_path")
        watch = LabelScore(unseen, adapter, args, label=label, option="watch_label")
    names = _part_names(functions, taken=(REWARD_MODEL, "length_penalty"))
    parts = {name: further(source) for name, source in zip(names, functions, strict=True)}
    return WeightedReward(args, reward_model, parts, args.weights, watch)


def load_toxicity_reward(args: RewardArguments, adapter: ModelAdapter, device: torch.device) -> WeightedReward:
    """Load a reward as ``load_reward`` does, with a classifier in it that measures toxicity.

    Raises:
        InputError: as ``load_reward``; no classifier has the toxicity label.
    """
    reward = load_reward(args, adapter, device)
    if not reward.measures_label:
        raise InputError(
            f"reward_model_name_or_path: toxicity is measured by a classifier with the label {args.toxicity_label!r}; "
            "give one, with weight 0 in reward_weights if it should not train"
        )
    return reward


def is_function(source: str) -> bool:
    """Whether an entry of ``reward_funcs`` is a Python function, ``module:function``, and no model."""
    return _FUNCTION.fullmatch(source) is not None


def reward_models(args: RewardArguments) -> list[str]:
    """Folders and hub ids of the models that the reward is made of; the unseen scorer is none of them."""
    models = [source.partition("#")[0] for source in args.reward_funcs or [] if not is_function(source)]
    return ([] if args.reward_model_name_or_path is None else [args.reward_model_name_or_path]) + models


class FunctionScore:
    """Scores by a Python function ``module:function``, whose arguments are lists of n, given by name.

    They are queries or prompts, responses or completions, and columns of the data set; ``**kwargs`` gets all of these.
    It returns n finite numbers. Every rank calls it with its own part of a batch.

    Raises:
        InputError: no such module or function, arguments without names; when called: an argument that is none of
            these, it raises, or its result is not n finite numbers.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.function = _load_function(source)
        self.parameters = _parameters(source, self.function)

    def __call__(self, queries: Sequence[str], responses: Sequence[str], columns: Columns = NO_COLUMNS) -> np.ndarray:
        """Scores (n,) in float64."""
        arguments = self._arguments(queries, responses, columns)
        try:
            result = self.function(**arguments)
        except Exception as error:
            raise InputError(f"{_OPTION}: {self.source} raised {_described(error)}") from error
        try:
            scores = np.array([float(value) for value in result])
        except (TypeError, ValueError) as error:
            kind = type(result).__name__
            raise InputError(f"{_OPTION}: {self.source} returned {kind}, not one number per response") from error
        if len(scores) != len(responses):
            raise InputError(
                f"{_OPTION}: {self.source} returned {len(scores)} scores for {len(responses)} responses; "
                "return one per response"
            )
        bad = np.flatnonzero(~np.isfinite(scores))
        if bad.size:
            shown = responses[bad[0]][:_SHOWN_CHARS]
            raise InputError(f"{_OPTION}: {self.source} returned {scores[bad[0]]} for the response {shown!r}")
        return scores

    def _arguments(self, queries: Sequence[str], responses: Sequence[str], columns: Columns) -> dict[str, list[Any]]:
        given: dict[str, Sequence[Any]] = {**columns}
        for values, names in ((queries, ("queries", "prompts")), (responses, ("responses", "completions"))):
            given |= dict.fromkeys(names, values)
        kinds = {parameter.kind for parameter in self.parameters}
        named = [parameter for parameter in self.parameters if parameter.kind in _BY_NAME]
        for parameter in named:
            if parameter.name not in given and parameter.default is parameter.empty:
                known = ", ".join(columns) or "none here"
                raise InputError(
                    f"{_OPTION}: {self.source} takes {parameter.name!r}, which is neither queries or prompts, "
                    f"responses or completions, nor a column of the data set ({known}); rename it"
                )
        wanted = given if inspect.Parameter.VAR_KEYWORD in kinds else [parameter.name for parameter in named]
        return {name: list(given[name]) for name in wanted if name in given}


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(source: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters of a reward function, all of which can be given by name."""
    if inspect.iscoroutinefunction(function):
        raise InputError(f"{_OPTION}: {source} is async; give a plain function")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise InputError(f"{_OPTION}: {source} does not name its arguments; wrap it in a function") from error
    by_place = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_ONLY]
    answers = {"responses", "completions"} & {parameter.name for parameter in parameters}
    if by_place or not (answers or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)):
        shown = ", ".join(str(parameter) for parameter in parameters)
        raise InputError(
            f"{_OPTION}: {source} takes ({shown}); arguments go by name: responses or completions, queries or prompts, "
            "columns of the data set, **kwargs"
        )
    return parameters


def _load_function(source: str) -> Callable[..., Any]:
    module_name, _, name = source.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does; it stays, for what the function imports later
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"{_OPTION}: cannot import {module_name} for {source}: {_described(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{_OPTION}: {module_name} has no function {name}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{_OPTION}: {source} is no function but {type(found).__name__}")
    return found


def _described(error: Exception) -> str:
    """Type, message and place of an error in a user's code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if place.filename.startswith("<") else f" ({Path(place.filename).name}:{place.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _part_names(sources: Iterable[str], taken: Sequence[str]) -> list[str]:
    """Short names for the log: the function's, the model folder's and its label; numbered where one comes again."""
    names = list(taken)
    for source in sources:
        if is_function(source):
            short = source.partition(":")[2]
        else:
            model, _, label = source.partition("#")
            short = ".".join(part for part in (Path(model).name, label) if part)
        number, unique = 2, short
        while unique in names:
            number, unique = number + 1, f"{short}_{number}"
        names.append(unique)
    return names[len(taken) :]
