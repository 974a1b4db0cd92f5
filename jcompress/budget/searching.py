"""The smallest stored model within an allowed loss, over several families of methods, by measured scores."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jcompress import core, io, rules
from jcompress.apply import compress
from jcompress.budget import allocation, ledger, strategy
from jcompress.budget.allocation import Costs, Options
from jcompress.budget.errors import Measure, measure_of
from jcompress.budget.strategy import DENSE
from jcompress.core import PyTree
from jcompress.numeric.dominance import hypervolume
from jcompress.rules import Plan


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model that a search measured.

    Attributes:
      stage: why: ``"dense"``, ``"family"``, ``"sensitivity"``, ``"allocation"`` or ``"refinement"``.
      names: ``{path: name of a family}``, without the paths that stay dense.
      score: what was measured.
      cost: what it costs, by default stored bits.
      allowed: whether it keeps the search's bounds.

    Example:
      >>> from jcompress import budget
      >>> budget.Evaluation("family", {"w": "int8"}, score=0.98, cost=4096, allowed=True).cost
      4096
    """

    stage: str
    names: dict[str, str]
    score: float
    cost: int
    allowed: bool


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What :func:`jcompress.search` found.

    Attributes:
      tree: the best model, ready for :func:`jcompress.save`.
      plan: the plan that makes it.
      best: its evaluation.
      rows: every evaluation in order, the dense model first.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8)}
      >>> found = jc.search(lambda tree: 1.0, w, {"int4": [("w", jc.quantize.Int(bits=4))]})
      >>> found.best.names, len(found.rows), len(found.front)
      ({'w': 'int4'}, 2, 1)
    """

    tree: PyTree
    plan: Plan
    best: Evaluation
    rows: tuple[Evaluation, ...]

    @property
    def front(self) -> tuple[Evaluation, ...]:
        """The evaluations that no other beats in both score and cost, from cheap to dear."""
        return tuple(strategy.front(list(self.rows)))

    def hypervolume(self, score: float, cost: float) -> float:
        """The area between the front and a worst score and cost; of two searches the better has more."""
        points = np.array([[row.score, -float(row.cost)] for row in self.front]).reshape(-1, 2)
        return hypervolume(points, np.array([score, -float(cost)]))

    def __str__(self) -> str:
        head = ("", "stage", "cost", "score", "families")
        lines = [
            ("*" if row == self.best else "", row.stage, str(row.cost), f"{row.score:.6g}", _counted(row.names))
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(5)]
        return "\n".join(
            "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)
        )


def _counted(names: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def search(
    score: Callable[[PyTree], float],
    params: PyTree,
    families: Mapping[str, Plan | Sequence[tuple[str, Any]]],
    drop: float | None = 0.01,
    stats: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    budget: float | None = None,
    cost: Costs | None = None,
    coded: bool = False,
    measure: Measure | str | None = None,
    evaluations: int = 100,
    step: Any = None,
    key: jax.Array | None = None,
    progress: bool | None = None,
) -> SearchResult:
    """The smallest stored model whose score falls by at most ``drop``, each leaf by the family that serves it best.

    Minimizes the cost over one family, or none, for each leaf. In order: the dense model and each family alone are
    scored; a table of sensitivities is made, of measured scores where there are few leaves and of an error measure
    priced by one score a leaf where there are more; the exact allocator (:func:`jcompress.budget.allocate`) gives the
    best mixtures by the table, which are scored while the bound is bracketed; then changes of one and two leaves that
    would be cheaper are tried, the most promising first, from each better model anew. What is promised is measured:
    the model that is returned has been scored and keeps the bound.

    With ``budget`` the cost is bounded and the score maximized. With ``drop=None`` and no budget neither is, and
    evaluations go along the front of both: read ``found.front`` and ``found.hypervolume``.

    It runs unattended. Every score is on disk when the next is taken; after a kill the same call in the same workdir
    goes on, and gives what it would have given.

    Args:
      score: ``score(tree) -> float``, higher is better; of a tree of nodes and arrays. It must give the same twice.
      params: a pytree of arrays.
      families: ``{name: rules or plan}``, as for :func:`jcompress.plan`: pruning, bits, ranks, codebooks, or nests of
        them. Each leaf may also stay dense. Methods that decide for several leaves at once are refused.
      drop: how far the score may fall below that of ``params``, in its unit.
      stats: ``{path: statistics}`` from calibration, for methods and for the error measure.
      workdir: a folder to keep evaluations in; None keeps none.
      budget: the most that ``cost`` may sum to, instead of ``drop``.
      cost: ``cost(tree) -> {path: whole number}``: :func:`jcompress.budget.bits` by default,
        :func:`jcompress.budget.bit_operations`, or a table of measured latencies.
      coded: whether to count entropy-coded bits, ``jc.nbits(tree, coded=True)``.
      measure: an error of one leaf, as for :func:`jcompress.budget.options`; by default relative output errors with
        ``stats``, and relative errors of weights without.
      evaluations: how often ``score`` may be called. Predictions are scaled by one call a leaf, or one a leaf and
        family, if these take at most half of the calls that the families leave.
      step: as in ``jc.compress``.
      key: as in ``jc.compress``; also seeds what is tried along a front.
      progress: show a bar, by tqdm; by default where it is installed and somebody watches.

    Returns:
      A :class:`jcompress.budget.SearchResult`.

    Raises:
      ImportError: for ``progress`` without tqdm.
      ValueError: without families, for a budget that nothing meets (the message says what the cheapest costs), a score
        that is no number, or a workdir that holds another search or is in use. Nothing is half-written then.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"large": 10 * jnp.eye(16), "small": jnp.linspace(0, 1, 256).reshape(16, 16)}
      >>> def score(tree):
      ...     return -float(sum(((x - params[name]) ** 2).sum() for name, x in jc.materialize(tree).items()))
      >>> families = {f"int{n}": [(".*", jc.quantize.Int(bits=n))] for n in (2, 4, 8)}
      >>> found = jc.search(score, params, families, drop=0.01)
      >>> found.best.names, round(found.best.score, 4)
      ({'large': 'int2', 'small': 'int8'}, -0.0011)
    """
    plans = _plans(params, families)
    if evaluations < 1 + len(families):
        raise ValueError(f"search: evaluations={evaluations}, expected one for each family and one more at least")
    cost = cost or (_coded_bits if coded else allocation.bits)
    trees = {name: compress(params, plan, step=step, key=key, stats=stats) for name, plan in plans.items()}
    table = _table(params, plans, trees, measure, stats, cost)
    bounds = strategy.Bounds(drop if budget is None else None, None if budget is None else math.floor(budget))
    _check_budget(table, bounds)
    about = {
        "parameters": ledger.fingerprint(params),
        "families": {name: {path: repr(method) for path, method in plan.items()} for name, plan in plans.items()},
        "costs": table.costs,
        "drop": bounds.drop,
        "budget": bounds.budget,
        "evaluations": evaluations,
    }
    with ledger.alone(workdir), _bar(progress, evaluations) as bar:
        run = _Run(score, params, trees, table, bounds, ledger.Ledger(workdir, about), evaluations, bar)
        best = strategy.follow(run, list(plans), _seed(key))
        names = [best.names.get(path, DENSE) for path in table.costs]
    leaves = {path: rules.leaves(trees[name])[path] for path, name in zip(table.costs, names, strict=True)}
    methods = {path: plans[name][path] for path, name in zip(table.costs, names, strict=True)}
    return SearchResult(
        rules.rebuild(params, leaves), next(iter(plans.values())).replace(methods), best, tuple(run.rows)
    )


def _plans(params: PyTree, families: Mapping[str, Any]) -> dict[str, Plan]:
    """The plans, the one that keeps all dense among them."""
    if not families or DENSE in families:
        raise ValueError(f"search: found the families {list(families)}, expected some, none of them named {DENSE!r}")
    made = {name: x if isinstance(x, Plan) else rules.plan(params, x) for name, x in families.items()}
    allocation.check_options(params, made)
    first = next(iter(made.values()))
    return {DENSE: first.replace(dict.fromkeys(first)), **made}


def _coded_bits(tree: PyTree) -> dict[str, int]:
    return {path: io.nbits(x, coded=True) for path, x in rules.paths(tree)}


def _table(
    params: PyTree, plans: Mapping[str, Plan], trees: Mapping[str, PyTree], measure: Any, stats: Any, cost: Costs
) -> Options:
    """Costs and errors of all leaves by all families; errors are relative ones unless a measure is given."""
    if measure is None:
        measure = "relative" if stats is not None else _relative
    measured = measure_of(measure, stats) if isinstance(measure, str) else measure
    dense = rules.leaves(params)
    found = Options({path: {} for path in dense}, {path: {} for path in dense})
    for name, tree in trees.items():
        costs, nodes = cost(tree), rules.leaves(tree)
        for path, w in dense.items():
            moved = 0.0 if plans[name][path] is None else float(measured(path, w, core.dense(nodes[path])))
            found.errors[path][name], found.costs[path][name] = moved, int(costs[path])
    return found


def _relative(path: str, w: Any, value: Any) -> float:
    w, value = np.asarray(w, np.float64), np.asarray(value, np.float64)
    size = float((w * w).sum())
    return float(((value - w) ** 2).sum()) / size if size else 0.0


def _check_budget(table: Options, bounds: strategy.Bounds) -> None:
    cheapest = sum(min(row.values()) for row in table.costs.values())
    if bounds.budget is not None and cheapest > bounds.budget:
        raise ValueError(
            f"search: the budget {bounds.budget} cannot be met: the cheapest methods cost {cheapest} together; raise "
            "it, or give families that cost less"
        )


def _seed(key: jax.Array | None) -> int:
    return 0 if key is None else int(jax.random.bits(key, dtype=np.uint32))


class _Run:
    """Scores models of a search, each once, and keeps the rows.

    Attributes:
      table: costs and errors.
      bounds: what is allowed.
      rows: all evaluations so far.
    """

    def __init__(
        self,
        score: Callable[[PyTree], float],
        params: PyTree,
        trees: Mapping[str, PyTree],
        table: Options,
        bounds: strategy.Bounds,
        book: ledger.Ledger,
        most: int,
        bar: Any,
    ) -> None:
        self._score, self._params, self._book, self._most, self._bar = score, params, book, most, bar
        self._nodes = {name: rules.leaves(tree) for name, tree in trees.items()}
        self._seen: dict[strategy.Names, Evaluation] = {}
        self.table, self.bounds = table, bounds
        self.rows: list[Evaluation] = []

    @property
    def left(self) -> int:
        """How many evaluations are left."""
        return self._most - len(self.rows)

    def seen(self, names: strategy.Names) -> bool:
        """Whether this model was scored."""
        return names in self._seen

    def cost(self, names: strategy.Names) -> int:
        """What a model costs."""
        return sum(self.table.costs[path][name] for path, name in zip(self.table.costs, names, strict=True))

    def evaluate(self, names: strategy.Names, stage: str) -> Evaluation:
        """Score a model, or look up what it scored."""
        if names in self._seen:
            return self._seen[names]
        chosen = {p: n for p, n in zip(self.table.costs, names, strict=True) if n != DENSE}
        key = " ".join(f"{path}={name}" for path, name in chosen.items())
        cost, score = self.cost(names), self._book.get(key)
        if score is None:
            leaves = {path: self._nodes[name][path] for path, name in zip(self.table.costs, names, strict=True)}
            score = self._scored(rules.rebuild(self._params, leaves), stage)
            self._book.put(key, score, {"stage": stage, "cost": cost, "names": chosen})
        allowed = self.bounds.allow(score, cost, self.rows[0].score if self.rows else score)
        row = Evaluation(stage, chosen, score, cost, allowed)
        self._seen[names] = row
        self.rows.append(row)
        self._bar(row)
        return row

    def _scored(self, tree: PyTree, stage: str) -> float:
        found = self._score(tree)
        try:
            score = float(found)
        except (TypeError, ValueError):
            raise ValueError(
                f"search: score gave {found!r} of type {type(found).__name__}, expected a number"
            ) from None
        if stage == DENSE and not math.isfinite(score):
            raise ValueError(f"search: the dense parameters score {score}, expected a finite number")
        return score


@contextlib.contextmanager
def _bar(progress: bool | None, total: int) -> Iterator[Callable[[Evaluation], None]]:
    """What shows each evaluation."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError('progress=True needs tqdm; pip install "jcompress[experiments]"') from error
        yield lambda row: None
        return
    with tqdm(total=total, desc="search", unit="model", disable=None if progress is None else not progress) as bar:

        def show(row: Evaluation) -> None:
            bar.set_postfix(cost=row.cost, score=f"{row.score:.5g}", refresh=False)
            bar.update()

        yield show
