import itertools
import sys

import numpy as np
import pytest
import tiny
import torch

from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.rl.config import RewardArguments
from yunque.rl.reward_sources import FunctionScore, is_function, load_reward, reward_models

CPU = torch.device("cpu")
QUERIES, RESPONSES = ["w3 w4", "w5"], ["w6", "w7 w8"]
LENGTHS = [2, 3]
FUNCTIONS = """
import torch

HELLO = "hello"

def words(queries, responses):
    assert type(queries) is type(responses) is list
    return [len(response.split()) for response in responses]

def as_tensor(queries, responses):
    return torch.tensor([float(len(query)) for query in queries])

class Scores:
    @staticmethod
    def zeros(queries, responses):
        return (0 for _ in responses)

def raises(queries, responses):
    return [1 / 0]

def one_too_many(queries, responses):
    return [1.0, 2.0, 3.0]

def not_finite(queries, responses):
    return [1.0, float("nan")]

def no_numbers(queries, responses):
    return [None, "one"]

def nothing(queries, responses):
    pass

def table(queries, responses):
    return torch.ones(2, 2)

def trl(completions, summary, **kwargs):
    assert kwargs["prompts"] == kwargs["queries"] and kwargs["text"]
    return [float(answer == wanted) for answer, wanted in zip(completions, summary)]

def keyword(*, prompts, completions, strict=True):
    return [len(prompt) - len(answer) for prompt, answer in zip(prompts, completions)]

def by_place(a, b):
    return [0.0, 0.0]

def positional(responses, /):
    return [0.0, 0.0]

async def later(responses):
    return [0.0, 0.0]
"""
module_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module of reward functions in the current folder, imported for the first time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    name = f"my_rewards_{next(module_numbers)}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    return name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a classifier and of a reward model with one output."""
    root = tmp_path_factory.mktemp("models")
    for name, labels in (("classifier", ("nothate", "hate")), ("scorer", ("LABEL_0",))):
        tiny.roberta(labels=labels).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


def load(**options):
    adapter = adapter_for(tiny.t5(), tiny.tokenizer())
    return load_reward(RewardArguments(**options), adapter, CPU)


# --- Python functions ---


@pytest.mark.parametrize(
    ("name", "expected"), [("words", [1.0, 2.0]), ("as_tensor", [5.0, 2.0]), ("Scores.zeros", [0.0, 0.0])]
)
def test_a_function_of_the_current_folder_is_found_and_called(module, name, expected):
    scores = FunctionScore(f"{module}:{name}")(tuple(QUERIES), tuple(RESPONSES))
    assert scores.dtype == np.float64
    assert scores.tolist() == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module_here:f", "cannot import no_such_module_here for .*: ModuleNotFoundError: No module named"),
        ("{module}:absent", "{module} has no function absent"),
        ("{module}:HELLO", "{module}:HELLO is no function but str"),
    ],
)
def test_a_function_that_is_not_there_is_refused_when_it_is_loaded(module, source, message):
    with pytest.raises(InputError, match=f"^reward_funcs: {message.format(module=module)}"):
        FunctionScore(source.format(module=module))


def test_a_module_that_breaks_says_where(module, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("\nraise RuntimeError('no key')\n")
    with pytest.raises(InputError, match=r"reward_funcs: .*RuntimeError: no key \(broken_rewards.py:2\)"):
        FunctionScore("broken_rewards:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"raised ZeroDivisionError: .* \({module}.py:19\)"),
        ("one_too_many", "returned 3 scores for 2 responses"),
        ("not_finite", "returned nan for the response 'w7 w8'"),
        ("no_numbers", "returned list, not one number per response"),
        ("nothing", "returned NoneType, not one number per response"),
        ("table", "returned Tensor, not one number per response"),
    ],
)
def test_a_function_that_fails_is_named_in_one_line(module, name, message):
    score = FunctionScore(f"{module}:{name}")
    with pytest.raises(InputError, match=f"^reward_funcs: {module}:{name} {message.format(module=module)}") as caught:
        score(QUERIES, RESPONSES)
    assert "\n" not in str(caught.value)


def test_arguments_are_bound_by_name(module):
    columns = {"summary": ["w6", "w9"], "text": ["w3", "w5"]}
    assert FunctionScore(f"{module}:trl")(QUERIES, RESPONSES, columns).tolist() == [1.0, 0.0]
    assert FunctionScore(f"{module}:keyword")(QUERIES, RESPONSES, columns).tolist() == [3.0, -3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("by_place", r"takes \(a, b\); arguments go by name"),
        ("positional", "arguments go by name"),
        ("later", "is async"),
    ],
)
def test_other_signatures_are_refused(module, name, message):
    with pytest.raises(InputError, match=f"^reward_funcs: {module}:{name} .*{message}"):
        FunctionScore(f"{module}:{name}")


def test_a_column_that_is_not_there_is_named(module):
    with pytest.raises(InputError, match=r"takes 'summary', which is neither .* \(text\)"):
        FunctionScore(f"{module}:trl")(QUERIES, RESPONSES, {"text": ["w3", "w5"]})


@pytest.mark.parametrize("source", ["rewards:f", "my.rewards:Class.f"])
def test_functions_are_told_from_models(source):
    assert is_function(source)


@pytest.mark.parametrize("source", ["name/model", "name/model#label", "./folder:1/x", "folder", "a b:c"])
def test_models_are_told_from_functions(source):
    assert not is_function(source)


# --- models and functions together ---


def test_every_kind_of_reward_is_summed_with_its_weight(module, models):
    classifier, scorer = str(models / "classifier"), str(models / "scorer")
    functions = [f"{module}:words", scorer, f"{classifier}#hate", f"{classifier}#hate"]
    weights = [2.0, 1.0, -0.5, 0.25, 0.0]
    reward = load(reward_model_name_or_path=classifier, reward_funcs=functions, reward_weights=weights)
    given = reward.scores(QUERIES, RESPONSES, LENGTHS)
    assert list(given.parts) == ["reward_model", "words", "scorer", "classifier.hate", "classifier.hate_2"]
    np.testing.assert_array_equal(given.parts["words"], [1.0, 2.0])
    np.testing.assert_array_equal(given.parts["classifier.hate"], given.parts["classifier.hate_2"])
    np.testing.assert_allclose(
        given.total, sum(weight * part for weight, part in zip(weights, given.parts.values(), strict=True)), rtol=1e-6
    )
    assert reward.measures_label


def test_a_classifier_without_a_label_takes_the_reward_s(models):
    folder = str(models / "classifier")
    named, plain = (load(reward_funcs=[source]).scores(QUERIES, RESPONSES, LENGTHS).total for source in
                    (f"{folder}#nothate", folder))  # fmt: skip
    np.testing.assert_array_equal(named, plain)


def test_a_reward_model_of_one_output_needs_no_label(models):
    reward = load(reward_model_name_or_path=str(models / "scorer"), reward_label="absent")
    assert not reward.measures_label
    assert len(set(reward.scores(QUERIES, RESPONSES, LENGTHS).total)) == 2


def test_an_unseen_scorer_has_a_label_of_its_own(models):
    folder = str(models / "classifier")
    first = load(reward_model_name_or_path=folder, watch_model_name_or_path=folder)
    other = load(reward_model_name_or_path=folder, watch_model_name_or_path=folder, watch_label="hate")
    given, opposed = (reward.scores(QUERIES, RESPONSES, LENGTHS) for reward in (first, other))
    np.testing.assert_array_equal(given.watch, given.total.astype(np.float32))
    assert not np.array_equal(opposed.watch, given.watch)
    np.testing.assert_array_equal(opposed.total, given.total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reward_model_name_or_path: give a classifier or reward model, or reward_funcs"),
        ({"reward_funcs": ["/absent/model"]}, "reward_funcs: no such model folder: /absent/model"),
        ({"reward_funcs": ["{classifier}#kind"]}, "reward_funcs: .*'kind'; it has nothate, hate"),
        ({"watch_model_name_or_path": "/absent"}, "watch_model_name_or_path: no such model folder"),
        ({"watch_model_name_or_path": "{classifier}", "watch_label": "kind"}, "watch_label: .*it has nothate, hate"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_its_option(models, options, message):
    classifier = str(models / "classifier")
    filled = {
        name: [part.format(classifier=classifier) for part in value] if isinstance(value, list)
        else value.format(classifier=classifier)
        for name, value in options.items()
    }  # fmt: skip
    if "watch_model_name_or_path" in filled:
        filled["reward_model_name_or_path"] = classifier
    with pytest.raises(InputError, match=message):
        load(**filled)


def test_parents_are_the_models_that_trained_the_policy():
    args = RewardArguments(
        reward_model_name_or_path="a", reward_funcs=["m:f", "b#x", "c"], watch_model_name_or_path="d"
    )
    assert reward_models(args) == ["a", "b", "c"]
    assert reward_models(RewardArguments(reward_funcs=["m:f"])) == []
