"""Greedy selection of units under a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.budget.costs import CostOfKeep, Keep
from jcompress.core import PyTree
from jcompress.trace import Groups, mask

Importance = Callable[[PyTree], Mapping[str, jax.Array]]
FineTune = Callable[[PyTree, Keep], PyTree]


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: whose cut was taken.

    Attributes:
      group: the group that was cut.
      kept: how many of its units stay.
      cost: of the model after the round.
      target: the cost that the round was to reach.
      score: of the model after the round.
      proposals: the score of each group's proposal.

    Example:
      >>> from jcompress import budget
      >>> budget.Round("up[1]", kept=4, cost=50.0, target=50.0, score=0.9, proposals={"up[1]": 0.9}).kept
      4
    """

    group: str
    kept: int
    cost: float
    target: float
    score: float
    proposals: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The result of :func:`netadapt`.

    Attributes:
      keep: ``{name: bool (size,)}``, for ``jc.trace.mask`` and ``jc.shrink``.
      params: fine-tuned, of the old shapes, zero where units are cut.
      cost: of what stays.
      history: the rounds.

    Example:
      >>> import numpy as np
      >>> from jcompress import budget
      >>> first = budget.Round("up[1]", kept=4, cost=50.0, target=50.0, score=0.9, proposals={"up[1]": 0.9})
      >>> found = budget.Adapted({"up[1]": np.arange(8) < 4}, params={}, cost=50.0, history=(first,))
      >>> int(found.keep["up[1]"].sum()), found.history[0].kept
      (4, 4)
    """

    keep: dict[str, np.ndarray]
    params: PyTree = dataclasses.field(repr=False)
    cost: float
    history: tuple[Round, ...] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        head = ("round", "group", "kept", "cost", "score")
        rows = [(str(i), r.group, str(r.kept), f"{r.cost:.6g}", f"{r.score:.6g}") for i, r in enumerate(self.history)]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in (head, *rows))


def netadapt(
    params: PyTree,
    groups: Groups,
    *,
    budget: float,
    step: float,
    cost: CostOfKeep,
    importance: Importance,
    score: Callable[[PyTree], Any],
    finetune: FineTune | None = None,
    decay: float = 1.0,
    multiple_of: int = 1,
    at_least: int = 1,
) -> Adapted:
    """Cut a model round by round until its cost is within the budget (NetAdapt; Yang et al. 2018, arXiv:1804.03230).

    In each round every group proposes: it cuts the least important of its units, as few as bring the cost of the model
    down by the step. The proposals are fine-tuned for a while and scored, and the best is taken. Where no group alone
    can save a whole step, each proposes all that it can, and the round saves less. The cost never rises, and ends at
    most at the budget. A loop on the host; models keep their shapes while it runs, so scores and fine-tuning compile
    once.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``. Those that cannot be cut are passed over.
      budget: the cost to reach.
      step: what a round is to save, in the unit of the cost.
      cost: ``cost(keep)`` of what stays, with ``keep`` empty or ``{name: bool (size,)}``; it must not rise as units are
        cut. ``groups.multiply_adds``, :func:`parameter_count`, or latency measured of the shrunk model::

            def cost(keep):
                small_fn, small = jc.shrink(fn, params, keep, *args)
                return jc.measure.latency(jax.jit(small_fn), small, *args).median

      importance: ``importance(params)`` gives ``{name: (size,)}``, larger stays:
        ``lambda p: jc.prune.structured.l2(p, groups)``, say. Groups that it does not name are left alone.
      score: ``score(params)`` of the masked model, larger is better: accuracy on held-out data, or minus the loss.
      finetune: ``finetune(params, keep)`` gives parameters trained for a short while. What is cut is set to zero again
        after it. None for no fine-tuning.
      decay: what the step is multiplied by after each round; the paper shrinks it slowly.
      multiple_of: sizes of groups that are cut are multiples of it, 8 or 128 say.
      at_least: units that stay in each group.

    Returns:
      An :class:`Adapted`: ``keep``, ``params`` and the history, which prints as a table.

    Raises:
      ValueError: for a step that is not positive, a decay outside (0, 1], a score that is NaN for all proposals, or
        if the budget cannot be met; the message says what can.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.array([[1.0, 5.0, 3.0, 4.0]]), "down": jnp.ones((4, 1))}
      >>> def fn(p, x):
      ...     return jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 1))
      >>> groups = jc.trace.coupling(fn, params, jnp.ones((2, 1)))
      >>> found = jc.budget.netadapt(
      ...     params, groups, budget=4, step=2, cost=jc.budget.parameter_count(params, groups),
      ...     importance=lambda p: jc.prune.structured.l1(p, groups), score=lambda p: fn(p, x).sum())
      >>> found.keep["up[1]"].tolist()
      [False, True, False, True]
      >>> print(found)
      round  group  kept  cost  score
      0      up[1]  3     6     12
      1      up[1]  2     4     9
    """
    _check(step, decay, multiple_of, at_least)
    keep: dict[str, np.ndarray] = {}
    now, history = float(cost(keep)), list[Round]()
    while now > budget:
        target = max(now - step * decay ** len(history), budget)
        ranked = _ranked(importance(params), groups)
        sizes = {name: _sizes(groups[name].size, keep.get(name), multiple_of, at_least) for name in ranked}
        cuts = {name: _cut(keep, name, ranked[name], sizes[name], cost, target) for name in ranked if sizes[name]}
        proposals = _feasible(cuts, now, target, budget)
        tried = {name: _tried(params, groups, proposals[name][0], finetune) for name in proposals}
        scores = {name: float(score(p)) for name, p in tried.items()}
        best = max(scores, key=lambda name: -math.inf if math.isnan(scores[name]) else scores[name])
        if math.isnan(scores[best]):
            raise ValueError(f"netadapt: round {len(history)}: the score of every proposal is NaN; check score=")
        (keep, now), params = proposals[best], tried[best]
        history.append(Round(best, int(keep[best].sum()), now, target, scores[best], scores))
    return Adapted(keep, params, now, tuple(history))


def _check(step: float, decay: float, multiple_of: int, at_least: int) -> None:
    if not step > 0:
        raise ValueError(f"netadapt: step={step} must be positive")
    if not 0 < decay <= 1:
        raise ValueError(f"netadapt: decay={decay} is outside (0, 1]")
    if multiple_of < 1 or at_least < 1:
        raise ValueError(f"netadapt: multiple_of={multiple_of} and at_least={at_least} must be positive")


def _ranked(importance: Mapping[str, jax.Array], groups: Groups) -> dict[str, np.ndarray]:
    """The importance of the units of each group that may be cut."""
    for name, x in importance.items():
        if name not in groups or jnp.shape(x) != (groups[name].size,):
            found = "there is no such group" if name not in groups else f"expected ({groups[name].size},)"
            raise ValueError(f"{name}: netadapt found importance of shape {jnp.shape(x)}; {found}")
    return {name: np.asarray(x, np.float64) for name, x in importance.items() if groups[name].prunable}


def _sizes(size: int, kept: np.ndarray | None, multiple_of: int, at_least: int) -> list[int]:
    """The sizes that a group may be cut to, falling."""
    now = size if kept is None else int(kept.sum())
    return [n for n in range(now - 1, at_least - 1, -1) if n % multiple_of == 0]


def _cut(
    keep: Keep, name: str, scores: np.ndarray, sizes: list[int], cost: CostOfKeep, target: float
) -> tuple[dict[str, np.ndarray], float]:
    """The largest size of one group at which the target is met, or the smallest there is."""
    stays = keep.get(name, np.ones(len(scores), bool))
    order = np.argsort(np.where(stays, -scores, np.inf), kind="stable")

    def at(size: int) -> tuple[dict[str, np.ndarray], float]:
        kept = np.zeros(len(scores), bool)
        kept[order[:size]] = True
        cut = {**keep, name: kept}
        return cut, float(cost(cut))

    low, high, best = 0, len(sizes) - 1, at(sizes[-1])
    if best[1] > target:
        return best
    while low < high:
        middle = (low + high) // 2
        found = at(sizes[middle])
        if found[1] <= target:
            high, best = middle, found
        else:
            low = middle + 1
    return best


def _feasible(
    cuts: dict[str, tuple[dict[str, np.ndarray], float]], now: float, target: float, budget: float
) -> dict[str, tuple[dict[str, np.ndarray], float]]:
    """The cuts that meet the target; if there are none, those that save anything."""
    met = {name: cut for name, cut in cuts.items() if cut[1] <= target}
    saving = met or {name: cut for name, cut in cuts.items() if cut[1] < now}
    if not saving:
        raise ValueError(
            f"netadapt: the budget {budget} cannot be met: the cost is {now} and no group that has scores can be cut "
            "further; raise the budget, score more groups, or lower at_least and multiple_of"
        )
    return saving


def _tried(params: PyTree, groups: Groups, keep: Keep, finetune: FineTune | None) -> PyTree:
    """The parameters of a proposal, zero where units are cut."""
    masked = mask(params, groups, keep)
    return masked if finetune is None else mask(finetune(masked, keep), groups, keep)
