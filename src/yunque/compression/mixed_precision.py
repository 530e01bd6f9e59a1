"""Which layer gets which scheme: the cheapest plan that passes a check, from damages that add up nearly.

Nothing here knows models, metrics or gates: layers are units with priced choices, the check is a function. Damages of
layers add up where errors are small and independent, which makes the choice a knapsack with one choice per unit; where
they do not, the joint damage of a plan is measured and the knapsack is solved again around that plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from yunque.errors import InputError

Choices = tuple[int, ...]
"""A plan: the number of the choice of every unit, in the order of the units."""

_MOST_POINTS = 4096  # of a frontier under construction; beyond it one plan per step of bytes is kept


@dataclass(frozen=True)
class Choice:
    """One way to keep a unit: its name, what it costs, and the damage of this unit alone, 0 or more."""

    scheme: str
    num_bytes: int
    damage: float


@dataclass(frozen=True)
class Unit:
    """A layer and its choices.

    Raises:
        InputError: no choice, a damage that is negative or no number.
    """

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        """Check the choices."""
        if not self.choices:
            raise InputError(f"{self.name}: no scheme can hold this layer; add float32 to the candidates")
        for choice in self.choices:
            if not choice.damage >= 0 or not math.isfinite(choice.damage):
                raise InputError(f"{self.name}: the damage of {choice.scheme} is {choice.damage}, not a finite number")


@dataclass(frozen=True)
class Judged:
    """What the check said of a plan: ``excess`` is how far it is from passing, 0 or less where it passes."""

    choices: Choices
    num_bytes: int
    passed: bool
    excess: float


@dataclass
class Search:
    """A search's result: ``best`` is None where no plan passed, and ``trace`` all checks in their order.

    ``complete`` says that the search ended by itself: no plan that is ``best`` with one unit cheaper passes.
    """

    best: Judged | None = None
    trace: list[Judged] = field(default_factory=list)
    complete: bool = False


def plan_bytes(units: Sequence[Unit], choices: Choices) -> int:
    """Bytes of all units under ``choices``."""
    return sum(unit.choices[number].num_bytes for unit, number in zip(units, choices, strict=True))


def plan_damage(units: Sequence[Unit], choices: Choices) -> float:
    """Sum of the units' damages under ``choices``."""
    return math.fsum(unit.choices[number].damage for unit, number in zip(units, choices, strict=True))


def frontier(units: Sequence[Unit]) -> list[Choices]:
    """The plans of which none is at once as cheap and as harmless, cheapest first.

    The multiple-choice knapsack of all budgets at once, by dominance (Kellerer, Pferschy and Pisinger 2004, section
    11.5): exact unless more than 4096 plans remain, of which then one per 1/4096 of the bytes is kept, the most
    harmless.
    """
    num_bytes, damages = np.zeros(1, dtype=np.int64), np.zeros(1)
    origins: list[tuple[np.ndarray, np.ndarray]] = []
    for unit in units:
        prices = np.array([choice.num_bytes for choice in unit.choices])
        harms = np.array([choice.damage for choice in unit.choices])
        all_bytes, all_damages = (num_bytes[:, None] + prices).ravel(), (damages[:, None] + harms).ravel()
        kept = _undominated(all_bytes, all_damages)
        if len(kept) > _MOST_POINTS:
            kept = _thinned(kept, all_bytes)
        origins.append((kept // len(prices), kept % len(prices)))
        num_bytes, damages = all_bytes[kept], all_damages[kept]
    return [_traced(origins, point) for point in range(len(num_bytes))]


def _undominated(num_bytes: np.ndarray, damages: np.ndarray) -> np.ndarray:
    """Numbers of the points that no other equals in both or beats, cheapest first."""
    order = np.lexsort((damages, num_bytes))
    lowest = np.minimum.accumulate(damages[order])
    return order[np.concatenate([[True], damages[order][1:] < lowest[:-1]])]


def _thinned(kept: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """Of points whose damage falls as bytes rise, the last in each step of bytes, and the cheapest."""
    low, high = num_bytes[kept[0]], num_bytes[kept[-1]]
    steps = (num_bytes[kept] - low) * (_MOST_POINTS - 1) // (high - low)
    last = np.concatenate([steps[1:] != steps[:-1], [True]])
    last[0] = True
    return kept[last]


def _traced(origins: Sequence[tuple[np.ndarray, np.ndarray]], point: int) -> Choices:
    choices = []
    for parents, numbers in reversed(origins):
        choices.append(int(numbers[point]))
        point = int(parents[point])
    return tuple(reversed(choices))


# --- search -----------------------------------------------------------------------------------------------------------


def cheapest_passing(
    units: Sequence[Unit],
    check: Callable[[Choices], tuple[bool, float]],
    *,
    joint_damage: Callable[[Choices], float] | None = None,
    most_checks: int = 24,
) -> Search:
    """The cheapest plan that ``check`` passes; it also says how far a plan is from passing (0 or less where it does).

    Bisection over the frontier; then again over the frontier of damages corrected by ``joint_damage`` around the
    dearest plan that failed; then one unit after the other is made cheaper while the plan still passes. Where damages
    add up and the check is a limit on their sum, the first step finds the optimum.
    """
    judge = _Judge(units, check, most_checks)
    plans = frontier(units)
    if judge(plans[0]).passed or not judge(safest := _safest(units)).passed:
        return judge.found(complete=True)
    plans += _ladder(units, plans[-1], safest)
    try:
        _bisect(judge, plans)
        if joint_damage is not None:
            _bisect_corrected(judge, joint_damage)
        _cheapen(judge, joint_damage)
    except _NoChecksLeft:
        return judge.found(complete=False)
    return judge.found(complete=True)


class _NoChecksLeft(Exception):
    pass


class _Judge:
    """The check, asked once for each plan and at most ``most_checks`` times (the cheapest and the safest always)."""

    def __init__(self, units: Sequence[Unit], check: Callable[[Choices], tuple[bool, float]], most_checks: int) -> None:
        self.units, self.check, self.most_checks = units, check, max(2, most_checks)
        self.known: dict[Choices, Judged] = {}

    def __call__(self, choices: Choices) -> Judged:
        if choices not in self.known:
            if len(self.known) >= self.most_checks:
                raise _NoChecksLeft
            passed, excess = self.check(choices)
            self.known[choices] = Judged(choices, plan_bytes(self.units, choices), passed, excess)
        return self.known[choices]

    @property
    def best(self) -> Judged | None:
        """The cheapest plan that has passed."""
        return min((one for one in self.known.values() if one.passed), key=lambda one: one.num_bytes, default=None)

    def best_failed(self) -> Judged:
        """The plan nearest to passing, of those that have not."""
        return min((one for one in self.known.values() if not one.passed), key=lambda one: one.excess)

    def found(self, *, complete: bool) -> Search:
        return Search(self.best, list(self.known.values()), complete)


def _safest(units: Sequence[Unit]) -> Choices:
    """Every unit at its most harmless choice, of equal ones the dearest: a prediction of no damage may be wrong."""
    return tuple(
        min(range(len(unit.choices)), key=lambda number: (unit.choices[number].damage, -unit.choices[number].num_bytes))
        for unit in units
    )


def _ladder(units: Sequence[Unit], start: Choices, end: Choices) -> list[Choices]:
    """Plans from ``start``, which is left out, to ``end``, one unit after the other, the cheapest step first."""
    steps = [number for number in range(len(units)) if start[number] != end[number]]
    steps.sort(key=lambda number: units[number].choices[end[number]].num_bytes)
    plans = []
    for number in steps:
        start = (*start[:number], end[number], *start[number + 1 :])
        plans.append(start)
    return plans


def _bisect(judge: _Judge, plans: Sequence[Choices]) -> None:
    """Find where plans begin to pass; the first has failed and the last has passed, or is dearer than one that has."""
    low, high = 0, len(plans) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if judge(plans[middle]).passed:
            high = middle
        else:
            low = middle


def _bisect_corrected(judge: _Judge, joint_damage: Callable[[Choices], float]) -> None:
    """Search once more among cheaper plans, with damages as they are in the company of the best plan that failed."""
    best = judge.best
    assert best is not None, "the end of the frontier has passed"
    units = corrected(judge.units, judge.best_failed().choices, joint_damage)
    plans = [choices for choices in frontier(units) if plan_bytes(judge.units, choices) < best.num_bytes]
    if plans and not judge(plans[0]).passed and judge(plans[-1]).passed:
        _bisect(judge, plans)


def corrected(units: Sequence[Unit], choices: Choices, joint_damage: Callable[[Choices], float]) -> list[Unit]:
    """The units with their damages scaled to what each does in the company of the others under ``choices``.

    That is the joint damage less the joint damage with this unit at its most harmless choice. The other choices of the
    unit are scaled by the same factor.
    """
    together = joint_damage(choices)
    found = []
    for number, unit in enumerate(units):
        harmless = min(range(len(unit.choices)), key=lambda choice: unit.choices[choice].damage)
        alone = unit.choices[choices[number]].damage
        if choices[number] == harmless or not alone:
            found.append(unit)
            continue
        without = joint_damage((*choices[:number], harmless, *choices[number + 1 :]))
        factor = max(together - without, 0.0) / alone
        scaled = tuple(replace(choice, damage=choice.damage * factor) for choice in unit.choices)
        found.append(replace(unit, choices=scaled))
    return found


def _cheapen(judge: _Judge, joint_damage: Callable[[Choices], float] | None) -> None:
    """Make one unit after the other cheaper, most bytes per damage first, until no single one can be."""
    best = judge.best
    assert best is not None, "the end of the frontier has passed"
    moved = True
    while moved:
        moved = False
        for choices in _by_yield(judge.units, best, joint_damage):
            if judge(choices).passed:
                best, moved = judge.known[choices], True
                break


def _by_yield(
    units: Sequence[Unit], best: Judged, joint_damage: Callable[[Choices], float] | None
) -> Iterator[Choices]:
    """The plans with one unit cheaper than in ``best``: those that save most for the damage they add first."""
    damage = joint_damage or (lambda choices: plan_damage(units, choices))
    before = damage(best.choices)
    ranked = []
    for number, unit in enumerate(units):
        for choice in range(len(unit.choices)):
            choices = (*best.choices[:number], choice, *best.choices[number + 1 :])
            saved = best.num_bytes - plan_bytes(units, choices)
            if saved > 0:
                ranked.append((max(damage(choices) - before, 0.0) / saved, choices))
    yield from (choices for _, choices in sorted(ranked))


def as_schemes(units: Sequence[Unit], choices: Choices) -> Mapping[str, str]:
    """The plan by names: unit -> scheme."""
    return {unit.name: unit.choices[number].scheme for unit, number in zip(units, choices, strict=True)}
