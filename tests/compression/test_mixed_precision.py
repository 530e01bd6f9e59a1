"""The search against every plan tried: exact where damages add up, sound where they do not."""

import itertools
import math
import random

import pytest

from yunque.compression.mixed_precision import (
    Choice,
    Unit,
    as_schemes,
    cheapest_passing,
    corrected,
    frontier,
    plan_bytes,
    plan_damage,
)
from yunque.errors import InputError

SCHEMES = (("int4", 0.5, 1.0), ("nf4", 0.625, 0.6), ("int8", 1.0, 0.03), ("float32", 4.0, 0.0))


def units_of(rng, number=6, noise=0.0):
    """Units with predicted damages, and the true ones, which differ by ``noise``."""
    units, truth = [], []
    for index in range(number):
        size, base = rng.choice((4, 8, 16, 32)) * 100, rng.lognormvariate(0, 1.5)
        true = [base * share * rng.uniform(0.7, 1.3) for _, _, share in SCHEMES]
        truth.append(true)
        choices = [
            Choice(name, int(size * price), damage * math.exp(noise * rng.gauss(0, 1)))
            for (name, price, _), damage in zip(SCHEMES, true, strict=True)
        ]
        units.append(Unit(f"layer{index}", tuple(choices)))
    return units, truth


def every_plan(units):
    return itertools.product(*(range(len(unit.choices)) for unit in units))


def optimum(units, check):
    passing = (choices for choices in every_plan(units) if check(choices)[0])
    return min((plan_bytes(units, choices) for choices in passing), default=None)


def limit_on(damage, limit):
    return lambda choices: (damage(choices) <= limit, damage(choices) - limit)


@pytest.mark.parametrize("seed", range(15))
def test_the_optimum_is_found_where_damages_add_up(seed):
    rng = random.Random(seed)
    units, _ = units_of(rng, number=5)
    limit = rng.uniform(0.01, 0.7) * plan_damage(units, (0,) * 5)
    check = limit_on(lambda choices: plan_damage(units, choices), limit)
    search = cheapest_passing(units, check, most_checks=64)
    assert search.complete
    assert search.best.passed
    assert search.best.num_bytes == optimum(units, check)


@pytest.mark.parametrize(("with_joint", "optima"), [(True, 14), (False, 12)])
def test_interactions_and_wrong_predictions(with_joint, optima):
    """True damages with cross terms, predicted with an error of a factor of two: sound always, the optimum mostly."""
    ratios = []
    for seed in range(20):
        rng = random.Random(seed)
        units, truth = units_of(rng, number=5, noise=0.7)
        cross = {pair: rng.uniform(0, 0.6) for pair in itertools.combinations(range(5), 2)}

        def damage(choices, truth=truth, cross=cross):
            alone = [truth[unit][number] for unit, number in enumerate(choices)]
            return sum(alone) + sum(share * math.sqrt(alone[a] * alone[b]) for (a, b), share in cross.items())

        check = limit_on(damage, rng.uniform(0.02, 0.6) * damage((0,) * 5))
        search = cheapest_passing(units, check, joint_damage=damage if with_joint else None, most_checks=64)
        assert search.best.passed
        assert search.complete
        ratios.append(search.best.num_bytes / optimum(units, check))
        for unit, number in itertools.product(range(5), range(4)):  # no single unit can be made cheaper
            choices = (*search.best.choices[:unit], number, *search.best.choices[unit + 1 :])
            assert not check(choices)[0] or plan_bytes(units, choices) >= search.best.num_bytes
    assert min(ratios) == 1
    assert sum(ratio == 1 for ratio in ratios) >= optima
    assert max(ratios) < 1.25


def test_the_frontier_is_what_no_plan_beats():
    units, _ = units_of(random.Random(3), number=4)
    plans = [(plan_bytes(units, choices), plan_damage(units, choices)) for choices in frontier(units)]
    assert plans == sorted(plans)
    points = [(plan_bytes(units, choices), plan_damage(units, choices)) for choices in every_plan(units)]
    best = [one for one in set(points) if not any(o[0] <= one[0] and o[1] <= one[1] and o != one for o in points)]
    assert [price for price, _ in plans] == sorted(price for price, _ in best)
    assert [harm for _, harm in plans] == pytest.approx([harm for _, harm in sorted(best)])


def test_a_large_frontier_is_thinned_and_stays_one():
    rng = random.Random(0)
    units = [
        Unit(str(index), tuple(Choice(str(n), rng.randrange(10**6), rng.random()) for n in range(4)))
        for index in range(120)
    ]
    plans = [(plan_bytes(units, choices), plan_damage(units, choices)) for choices in frontier(units)]
    assert 1000 < len(plans) <= 4097
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(plans))
    assert plans[0][0] == sum(min(choice.num_bytes for choice in unit.choices) for unit in units)
    assert plans[-1][1] == pytest.approx(sum(min(choice.damage for choice in unit.choices) for unit in units))


def test_when_all_plans_pass_the_cheapest_is_asked_once():
    units, _ = units_of(random.Random(0))
    search = cheapest_passing(units, lambda choices: (True, -1.0))
    assert search.best.choices == (0,) * 6
    assert len(search.trace) == 1


def test_when_no_plan_passes_two_are_asked_and_none_is_given():
    units, _ = units_of(random.Random(0))
    search = cheapest_passing(units, lambda choices: (False, 1.0))
    assert search.best is None
    assert search.complete
    assert {one.choices for one in search.trace} == {(0,) * 6, (3,) * 6}


def test_layers_go_up_although_no_damage_was_predicted():
    """Damages of 0 make the cheapest plan the only one of the frontier; the check knows better."""
    units = [Unit(str(n), (Choice("int4", 1 + n, 0.0), Choice("float32", 8 + n, 0.0))) for n in range(4)]
    search = cheapest_passing(units, lambda choices: (choices[2] == 1, 1.0 - choices[2]))
    assert as_schemes(units, search.best.choices) == {"0": "int4", "1": "int4", "2": "float32", "3": "int4"}


def test_checks_are_limited():
    units, _ = units_of(random.Random(1), number=6)
    asked = []

    def check(choices):
        asked.append(choices)
        return plan_damage(units, choices) <= 0.3, plan_damage(units, choices) - 0.3

    search = cheapest_passing(units, check, most_checks=4)
    assert not search.complete
    assert search.best.passed
    assert len(asked) == len(set(asked)) == 4


def test_corrected_damages_are_those_in_company():
    units = [Unit(name, (Choice("int4", 1, 2.0), Choice("float32", 4, 0.0))) for name in "ab"]
    joint = {(0, 0): 10.0, (1, 0): 3.0, (0, 1): 4.0}
    found = corrected(units, (0, 0), joint.__getitem__)
    assert [unit.choices[0].damage for unit in found] == [7.0, 6.0]  # 10 - 3 and 10 - 4
    assert [unit.choices[1].damage for unit in found] == [0.0, 0.0]


def test_bad_units_are_refused():
    for damage in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="not a finite number"):
            Unit("a", (Choice("int4", 1, damage),))
    with pytest.raises(InputError, match="no scheme"):
        Unit("a", ())
