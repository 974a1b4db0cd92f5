"""A method for each leaf under a budget of bytes, multiply-adds or bit operations: exact, by dynamic programming."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jcompress import core, rules
from jcompress.apply import compress
from jcompress.budget import errors as measures
from jcompress.budget.errors import Measure
from jcompress.core import PyTree
from jcompress.rules import Plan
from jcompress.trace import cost as cost_of

Table = Mapping[str, Mapping[str, float]]
"""``{path: {name of a plan: number}}``."""

Costs = Callable[[PyTree], Mapping[str, float]]
"""What each leaf of a compressed tree costs, by path, in whole numbers."""


def bits(tree: PyTree) -> dict[str, int]:
    """The exact stored bits of each leaf, by path; their sum is ``jc.nbits(tree)``.

    Args:
      tree: any pytree of arrays and nodes.

    Returns:
      ``{path: bits}``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.budget.bits({"a": jnp.ones((2, 3)), "b": jc.quantize.Int(bits=4)(jnp.ones((2, 3)))})
      {'a': 192, 'b': 120}
    """
    return {path: core.leaf_nbits(x) for path, x in rules.paths(tree)}


def multiply_adds(fn: Callable[..., Any], params: PyTree, *args: Any) -> Costs:
    """The multiply-adds of each leaf: of factors one after the other, of masks what they keep.

    Codes and codebooks multiply like the dense array, and cost what it costs.

    Args:
      fn: any JAX function of ``(params, *args)``; it is traced once.
      params: a pytree of arrays, or their shapes.
      *args: example arguments; their batch size is part of the count.

    Returns:
      A function of a compressed tree, for ``cost`` of :func:`mixed`: ranks, and what stays dense, under a budget.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.eye(8), "b": jnp.diag(jnp.arange(8.0))}
      >>> count = jc.budget.multiply_adds(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 8)))
      >>> ranks = {f"{r}": jc.plan(params, [(".*", jc.factorize.SVD(rank=r))]) for r in (1, 2, 4)}
      >>> print(jc.budget.mixed(params, ranks, 96, measure="weight", cost=count))
      path  shape  method
      a     8x8    SVD(rank=2)
      b     8x8    SVD(rank=4)
    """
    counted = cost_of(fn, params, *args)
    return lambda tree: {row.path: round(row.compressed_multiply_adds) for row in counted.compressed(tree).rows}


def bit_operations(fn: Callable[..., Any], params: PyTree, *args: Any) -> Costs:
    """The bit operations of each leaf: multiply-adds x bits of the weight x bits of the activation.

    Args:
      fn: any JAX function of ``(params, *args)``; it is traced once.
      params: a pytree of arrays, or their shapes.
      *args: example arguments; their batch size is part of the count.

    Returns:
      A function of a compressed tree, for ``cost`` of :func:`mixed`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.ones((2, 3))}
      >>> count = jc.budget.bit_operations(lambda p, x: x @ p["a"], params, jnp.ones((5, 2)))
      >>> count({"a": jc.quantize.Int(bits=4)(params["a"])})
      {'a': 3840}
    """
    counted = cost_of(fn, params, *args)
    return lambda tree: {r.path: round(r.compressed_bit_operations) for r in counted.compressed(tree).rows}


@dataclasses.dataclass(frozen=True)
class Options:
    """What each plan does to each leaf.

    Attributes:
      errors: ``{path: {name: error}}``.
      costs: ``{path: {name: cost}}``.

    Example:
      >>> from jcompress import budget
      >>> known = budget.Options(errors={"w": {"int4": 0.5, "int8": 0.1}}, costs={"w": {"int4": 4, "int8": 8}})
      >>> known.total({"w": "int4"})
      (0.5, 4)
    """

    errors: dict[str, dict[str, float]]
    costs: dict[str, dict[str, int]]

    def total(self, names: Mapping[str, str]) -> tuple[float, int]:
        """The predicted error and the cost of one option for each path."""
        error = math.fsum(self.errors[path][name] for path, name in names.items())
        return error, sum(self.costs[path][name] for path, name in names.items())

    def __str__(self) -> str:
        rows = [("path", "plan", "cost", "error")]
        rows += [(p, n, str(self.costs[p][n]), f"{e:.4g}") for p, row in self.errors.items() for n, e in row.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def options(
    params: PyTree,
    plans: Mapping[str, Plan],
    *,
    measure: str | Measure = "output",
    cost: Costs = bits,
    stats: Mapping[str, Any] | None = None,
    step: Any = None,
    key: jax.Array | None = None,
) -> Options:
    """Compress by each plan in turn, and note for each leaf what it costs and how far it moves.

    A leaf that a plan keeps dense has the error 0 and costs what it costs dense.

    Args:
      params: a pytree of arrays.
      plans: ``{name: plan}`` of the same parameters. Methods that decide for several leaves at once are refused.
      measure: ``"output"``, ``"relative"``, ``"weight"`` or ``"trace"``, from ``stats``
        (:func:`jcompress.budget.measure_of`), or any ``measure(path, dense, compressed) -> error``, such as
        :func:`jcompress.budget.loss_change` or :func:`jcompress.budget.curvature_error`.
      cost: :func:`bits`, :func:`multiply_adds`, :func:`bit_operations`, or any function of a compressed tree.
      stats: from ``jc.calibrate``, for the methods and for the measure.
      step: as in ``jc.compress``.
      key: as in ``jc.compress``.

    Returns:
      An :class:`Options`; prints as a table.

    Raises:
      ValueError: without plans, for plans of other parameters, for a method that decides for several leaves, or where
        the measure has no statistics; the message names the path.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.0, 0.4], [-7.0, 7.0]])}
      >>> plans = {f"int{b}": jc.plan(params, [("w", jc.quantize.Int(bits=b))]) for b in (2, 8)}
      >>> found = jc.budget.options(params, plans, measure="weight")
      >>> found.costs["w"], found.errors["w"]["int2"] > found.errors["w"]["int8"]
      ({'int2': 72, 'int8': 96}, True)
    """
    check_options(params, plans)
    measured = measures.measure_of(measure, stats) if isinstance(measure, str) else measure
    leaves = rules.leaves(params)
    found = Options({path: {} for path in leaves}, {path: {} for path in leaves})
    for name, plan in plans.items():
        tree = compress(params, plan, step=step, key=key, stats=stats)
        costs = cost(tree)
        for path, x in rules.paths(tree):
            moved = 0.0 if plan[path] is None else float(measured(path, leaves[path], core.dense(x)))
            found.errors[path][name], found.costs[path][name] = moved, int(costs[path])
    return found


def check_options(params: PyTree, plans: Mapping[str, Plan]) -> None:
    """Raise for plans of other parameters, or that decide for several leaves at once."""
    paths = set(rules.leaves(params))
    if not plans:
        raise ValueError("options: found no plan, expected {name: plan}")
    for name, plan in plans.items():
        if different := sorted(set(plan) ^ paths):
            raise ValueError(f"{different[0]}: the plan {name!r} is for other parameters; make it with jc.plan(params)")
        for path, method in plan.items():
            if method is not None and core.is_joint(method):
                raise ValueError(
                    f"{path}: {method!r} of the plan {name!r} decides for several leaves at once, and here each leaf "
                    'is chosen by itself; use scope="leaf"'
                )


def allocate(plans: Mapping[str, Plan], errors: Table, costs: Table, budget: float) -> Plan:
    """The plan with the least sum of errors that the budget can pay: one of the plans' methods for each leaf.

    The multiple-choice knapsack, solved exactly: leaf by leaf, all sums of costs and errors are kept that no other
    beats in both and whose Lagrangian bound is not above the error of a plan known already (mixed precision as a
    knapsack: HAWQ-V2, Dong et al. 2020, arXiv:1911.03852; HAWQ-V3, Yao et al. 2021, arXiv:2011.10680). Costs are whole
    numbers and exact, which a solver in floating point would not be, and no other package is needed.

    Args:
      plans: ``{name: plan}``, of the same parameters: other bits, or other methods.
      errors: ``{path: {name: error}}`` for every path; finite, and added up over leaves.
      costs: ``{path: {name: cost}}``, whole numbers.
      budget: the most that the costs may sum to.

    Returns:
      A plan. Among plans of equal error the cheapest is not promised.

    Raises:
      ValueError: for an error that is not finite, a missing path or name, or a budget that no plan can pay; the
        message says what the cheapest costs.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
      >>> plans = {f"{n} bits": jc.plan(params, [(".*", jc.quantize.Int(bits=n))]) for n in (2, 4)}
      >>> errors = {"a": {"2 bits": 1.0, "4 bits": 0.1}, "b": {"2 bits": 5.0, "4 bits": 0.2}}
      >>> costs = {path: {"2 bits": 2, "4 bits": 4} for path in params}
      >>> print(jc.budget.allocate(plans, errors, costs, budget=6))
      path  shape  method
      a     8x8    Int(bits=2)
      b     8x8    Int(bits=4)
    """
    names, first = list(plans), next(iter(plans.values()))
    rows = []
    for path in first:
        try:
            rows.append(([int(costs[path][n]) for n in names], [float(errors[path][n]) for n in names]))
        except KeyError as missing:
            raise ValueError(f"{path}: allocate found no {missing} among the errors or the costs") from None
        if not np.isfinite(rows[-1][1]).all():
            raise ValueError(f"{path}: allocate needs finite errors, found {errors[path]}")
    chosen = choose([c for c, _ in rows], [e for _, e in rows], math.floor(budget))
    return first.replace({path: plans[names[i]][path] for path, i in zip(first, chosen, strict=True)})


def mixed(
    params: PyTree,
    plans: Mapping[str, Plan],
    budget: float,
    *,
    measure: str | Measure = "output",
    cost: Costs = bits,
    stats: Mapping[str, Any] | None = None,
    step: Any = None,
    key: jax.Array | None = None,
) -> Plan:
    """The best mixture of plans under a budget: :func:`options`, then :func:`allocate`.

    Args:
      params: a pytree of arrays.
      plans: ``{name: plan}``: other bits, or other methods. A plan of nothing but ``None`` lets leaves stay dense.
      budget: the most that ``cost`` may sum to over all leaves: stored bits, those of dense leaves included.
      measure: as in :func:`options`.
      cost: as in :func:`options`.
      stats: as in :func:`options`.
      step: as in :func:`options`.
      key: as in :func:`options`.

    Returns:
      A plan: ``jc.nbits(jc.compress(params, plan, ...))`` is at most the budget, if that is what it counts.

    Raises:
      ValueError: as :func:`options` and :func:`allocate`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"large": 10 * jnp.eye(16), "small": jnp.linspace(0, 1, 256).reshape(16, 16)}
      >>> plans = {f"{n}": jc.plan(params, [(".*", jc.quantize.Int(bits=n))]) for n in (2, 4, 8)}
      >>> print(jc.budget.mixed(params, plans, budget=256 * (2 + 8) + 1024, measure="weight"))
      path   shape  method
      large  16x16  Int(bits=2)
      small  16x16  Int(bits=8)
    """
    found = options(params, plans, measure=measure, cost=cost, stats=stats, step=step, key=key)
    return allocate(plans, found.errors, found.costs, budget)


def choose(costs: list[list[int]], errors: list[list[float]], budget: int) -> list[int]:
    """The index of one option in each row, with the least sum of errors among those whose costs the budget pays."""
    c, e = [np.asarray(x, np.int64) for x in costs], [np.asarray(x, np.float64) for x in errors]
    cheapest = sum(int(x.min()) for x in c)
    if cheapest > budget:
        raise ValueError(f"allocate: the budget {budget} cannot be met: the cheapest methods cost {cheapest} together")
    price, known = _price(c, e, budget)
    best = math.fsum(row[i] for row, i in zip(e, known, strict=True))
    slack = 1e-9 * (1 + sum(float(np.abs(x).max()) for x in e))
    # What the leaves after each one cost at least, and add at least to the error at this price.
    least = np.cumsum([0, *(int(x.min()) for x in reversed(c))])[::-1]
    bound = np.cumsum([0.0, *(float((y + price * x).min()) for x, y in zip(reversed(c), reversed(e), strict=True))])[
        ::-1
    ]
    cost, error, steps = np.zeros(1, np.int64), np.zeros(1), []
    for i, (x, y) in enumerate(zip(c, e, strict=True), 1):
        total, summed = (cost[:, None] + x).ravel(), (error[:, None] + y).ravel()
        possible = total + least[i] <= budget
        possible &= summed + bound[i] - price * (budget - total) <= best + slack
        kept = np.flatnonzero(possible)
        kept = kept[np.lexsort((summed[kept], total[kept]))]
        before = np.minimum.accumulate(np.concatenate([[np.inf], summed[kept][:-1]]))
        kept = kept[summed[kept] < before]
        cost, error = total[kept], summed[kept]
        steps.append((kept // len(x), kept % len(x)))
    state, chosen = int(np.argmin(error)), []
    for parents, picked in reversed(steps):
        chosen.append(int(picked[state]))
        state = int(parents[state])
    return chosen[::-1]


def _price(costs: list[np.ndarray], errors: list[np.ndarray], budget: int) -> tuple[float, list[int]]:
    """The error that a unit of budget is worth (the Lagrange multiplier), and the choice it leads to, within budget."""

    def at(price: float) -> list[int]:
        return [int(np.lexsort((c, e + price * c))[0]) for c, e in zip(costs, errors, strict=True)]

    def spent(chosen: list[int]) -> int:
        return sum(int(c[i]) for c, i in zip(costs, chosen, strict=True))

    if spent(free := at(0.0)) <= budget:
        return 0.0, free
    low, high = 0.0, 1e-12
    while spent(at(high)) > budget:
        if high > 1e300:
            return 0.0, [int(c.argmin()) for c in costs]
        low, high = high, 2 * high
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) > budget else (low, middle)
    return high, at(high)
