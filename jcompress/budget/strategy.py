"""In which order a search measures models: families, sensitivities, mixtures by the allocator, and small changes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jcompress.budget.allocation import Options, choose

DENSE = "dense"
Names = tuple[str, ...]
"""The name of a family for each leaf, in the order of the table."""

_WHOLE, _LADDER, _CLOSE, _AWFUL = 4096, 8, 0.002, 1e9


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a search allows: a fall of the score, or a cost, or anything.

    Attributes:
      drop: how far the score may fall.
      budget: the most that a model may cost.
    """

    drop: float | None
    budget: int | None

    def allow(self, score: float, cost: int, dense: float) -> bool:
        """Whether a model keeps the bound."""
        if math.isnan(score):
            return False
        if self.budget is not None:
            return cost <= self.budget
        return self.drop is None or score >= dense - self.drop

    def rank(self, row: Any) -> tuple[float, float]:
        """What is sorted by to find the best: cost, or score where that is not the bound."""
        return (row.cost, -row.score) if self.drop is not None else (-row.score, row.cost)


class Run(Protocol):
    """What a strategy is told, and how it measures."""

    table: Options
    bounds: Bounds
    rows: list[Any]

    @property
    def left(self) -> int:
        """How many evaluations are left."""
        ...

    def seen(self, names: Names) -> bool:
        """Whether this model was scored."""
        ...

    def cost(self, names: Names) -> int:
        """What a model costs."""
        ...

    def evaluate(self, names: Names, stage: str) -> Any:
        """Score a model."""
        ...


def follow(run: Run, families: Sequence[str], seed: int) -> Any:
    """Spend the evaluations; the best row that keeps the bound."""
    leaves = len(run.table.costs)
    for name in families:
        run.evaluate((name,) * leaves, DENSE if name == DENSE else "family")
    lattice = Lattice.of(run, families)
    if run.bounds.drop is None and run.bounds.budget is None:
        _along_the_front(run, lattice, np.random.default_rng(seed))
    else:
        _by_allocation(run, lattice)
        _by_changes(run, lattice)
    allowed = [row for row in run.rows if row.allowed]
    if not allowed:  # the cheapest model is within the budget, and its score may be no number
        raise ValueError(f"search: none of the {len(run.rows)} models that were scored keeps the bound; raise it")
    return min(allowed, key=run.bounds.rank)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The choices of each leaf, none twice, with costs and predicted falls of the score.

    Attributes:
      names: of each leaf's choices.
      costs: of each.
      errors: predicted falls, at least 0.
    """

    names: list[list[str]]
    costs: list[list[int]]
    errors: list[list[float]]

    @classmethod
    def of(cls, run: Run, families: Sequence[str]) -> Lattice:
        """From the table of a run; what is measured of leaves alone costs evaluations."""
        names, costs, errors = [], [], []
        for path, row in run.table.costs.items():
            kept: dict[tuple[int, float], str] = {}
            for name in families:
                kept.setdefault((row[name], run.table.errors[path][name]), name)
            names.append(list(kept.values()))
            costs.append([cost for cost, _ in kept])
            errors.append([error if math.isfinite(error) else _AWFUL for _, error in kept])
        return cls(names, costs, _priced(run, names, costs, errors))

    @property
    def size(self) -> int:
        """How many models there are."""
        return math.prod(map(len, self.names))

    def named(self, picked: Sequence[int]) -> Names:
        """The names of one choice for each leaf."""
        return tuple(row[i] for row, i in zip(self.names, picked, strict=True))

    def picked(self, names: dict[str, str], paths: Sequence[str]) -> list[int]:
        """The choices of a model that was scored; a name that does what an earlier one does is that one."""
        return [
            row.index(name) if (name := names.get(path, DENSE)) in row else 0
            for row, path in zip(self.names, paths, strict=True)
        ]

    def error(self, picked: Sequence[int]) -> float:
        """The predicted fall of a model."""
        return math.fsum(row[i] for row, i in zip(self.errors, picked, strict=True))

    def allocated(self, budget: int) -> Names:
        """The best model by prediction for this cost."""
        return self.named(choose(self.costs, self.errors, budget))


def _priced(run: Run, names: list[list[str]], costs: list[list[int]], errors: list[list[float]]) -> list[list[float]]:
    """Errors in units of the score: measured one by one, or scaled by one measurement a leaf, or as they are."""
    options = [(i, j) for i, row in enumerate(names) for j in range(len(row)) if row[j] != DENSE]
    leaves = {i for i, _ in options}
    if len(options) <= run.left // 2:
        falls = {place: _fall(run, names, *place) for place in options}
        slight = 1e-6 * max([*falls.values(), 1e-30]) / max(max(map(max, errors)), 1e-30)
        return [
            [falls.get((i, j), 0.0) + slight * error for j, error in enumerate(row)] for i, row in enumerate(errors)
        ]
    if len(leaves) > run.left // 2:
        return errors
    priced = [list(row) for row in errors]
    for i in sorted(leaves):
        cheapest = min((costs[i][j], errors[i][j], j) for k, j in options if k == i)[2]
        price = max(_fall(run, names, i, cheapest), 1e-9) / max(errors[i][cheapest], 1e-30)
        priced[i] = [price * error for error in errors[i]]
    return priced


def _fall(run: Run, names: list[list[str]], leaf: int, choice: int) -> float:
    """How far the score falls with this leaf alone compressed."""
    alone = [DENSE] * len(names)
    alone[leaf] = names[leaf][choice]
    fall = run.rows[0].score - run.evaluate(tuple(alone), "sensitivity").score
    return min(max(fall, 0.0), _AWFUL) if not math.isnan(fall) else _AWFUL


def _by_allocation(run: Run, lattice: Lattice) -> None:
    """Score the best mixtures by prediction: at the budget, or while the bound of the score is bracketed."""
    if run.bounds.budget is not None:
        if run.left:
            run.evaluate(lattice.allocated(run.bounds.budget), "allocation")
        return
    low, high = sum(map(min, lattice.costs)), min(row.cost for row in run.rows if row.allowed)
    for budget in _predicted(run, lattice, low, high), low:
        if run.left and low < high:
            row = run.evaluate(lattice.allocated(budget), "allocation")
            low, high = (low, min(high, row.cost)) if row.allowed else (max(low, budget + 1), high)
    while run.left and high - low > _CLOSE * high:
        middle = (low + high) // 2
        row = run.evaluate(lattice.allocated(middle), "allocation")
        low, high = (low, min(middle, row.cost)) if row.allowed else (middle + 1, high)


def _predicted(run: Run, lattice: Lattice, low: int, high: int) -> int:
    """The least cost at which the predicted fall is allowed."""
    drop = run.bounds.drop or 0.0
    while low < high:
        middle = (low + high) // 2
        if lattice.error(choose(lattice.costs, lattice.errors, middle)) <= drop:
            high = middle
        else:
            low = middle + 1
    return low


def _by_changes(run: Run, lattice: Lattice) -> None:
    """Score models near the best one that might be better, the most promising first, while there are any."""
    paths = list(run.table.costs)
    while run.left:
        best = min((row for row in run.rows if row.allowed), key=run.bounds.rank, default=None)
        if best is None:
            return
        picked = lattice.picked(best.names, paths)
        for names in _candidates(run, lattice, picked, best):
            row = run.evaluate(names, "refinement")
            if row.allowed and run.bounds.rank(row) < run.bounds.rank(best):
                break
            if not run.left:
                return
        else:
            return


def _candidates(run: Run, lattice: Lattice, picked: list[int], best: Any) -> Iterator[Names]:
    """Models that no evaluation has met: all of them where they are few, else those of one or two other choices."""
    known = lattice.error(picked)
    fallen = run.rows[0].score - best.score
    limit = known if run.bounds.drop is None or fallen <= 0 else known * run.bounds.drop / fallen
    found = []
    for choice in _neighbours(lattice, picked):
        names = lattice.named(choice)
        cost, error = run.cost(names), lattice.error(choice)
        possible = cost < best.cost if run.bounds.budget is None else cost <= run.bounds.budget
        if possible and not run.seen(names):
            order = (0, cost, error) if error <= limit else (1, error, cost)
            found.append((order if run.bounds.budget is None else (0, error, cost), names))
    return (names for _, names in sorted(found))


def _neighbours(lattice: Lattice, picked: list[int]) -> Iterator[list[int]]:
    if lattice.size <= _WHOLE:
        yield from (list(choice) for choice in itertools.product(*(range(len(row)) for row in lattice.names)))
        return
    moves = [(i, j) for i, row in enumerate(lattice.names) for j in range(len(row)) if j != picked[i]]
    for one, other in itertools.chain(zip(moves, moves, strict=True), itertools.combinations(moves, 2)):
        if one == other or one[0] != other[0]:
            changed = list(picked)
            changed[one[0]], changed[other[0]] = one[1], other[1]
            yield changed


def _along_the_front(run: Run, lattice: Lattice, rng: np.random.Generator) -> None:
    """Mixtures at costs evenly apart in their logarithms, then between neighbours on the front, then random changes."""
    low, high = sum(map(min, lattice.costs)), sum(map(max, lattice.costs))
    ladder = [math.floor(x) for x in np.geomspace(max(low, 1), max(high, 1), _LADDER)]
    for budget in (max(x, low) for x in ladder):
        if run.left:
            run.evaluate(lattice.allocated(budget), "allocation")
    for _ in range(20 * run.left):
        if not run.left:
            return
        best = front(run.rows)
        gaps = [math.log(max(b.cost, 1) / max(a.cost, 1)) for a, b in itertools.pairwise(best)]
        names = None
        if gaps and rng.random() < 0.5:
            at = int(np.argmax(gaps))
            names = lattice.allocated((best[at].cost + best[at + 1].cost) // 2)
        if names is None or run.seen(names):
            names = _mutated(run, lattice, best[int(rng.integers(len(best)))], rng)
        if not run.seen(names):
            run.evaluate(names, "refinement")


def front(rows: list[Any]) -> list[Any]:
    """Rows that no other beats in both score and cost, from cheap to dear."""
    kept: list[Any] = []
    for row in sorted((row for row in rows if not math.isnan(row.score)), key=lambda row: (row.cost, -row.score)):
        if not kept or row.score > kept[-1].score:
            kept.append(row)
    return kept


def _mutated(run: Run, lattice: Lattice, row: Any, rng: np.random.Generator) -> Names:
    """A model of the front with one or two other choices."""
    picked = lattice.picked(row.names, list(run.table.costs))
    for leaf in rng.integers(len(picked), size=rng.integers(1, 3)):
        picked[leaf] = int(rng.integers(len(lattice.names[leaf])))
    return lattice.named(picked)
