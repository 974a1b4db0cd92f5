"""Early exits: an example leaves the network where a head is sure of it (BranchyNet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jcompress.nn.kernels import listed, one_by_one

Stage = Callable[[Any], Any]


def exit_entropy(logits: jax.Array) -> jax.Array:
    """How unsure a head is: ``H(p) = -sum p log p`` of its distribution (BranchyNet; Teerapittayanon et al. 2016).

    Args:
      logits: (..., classes).

    Returns:
      Entropies (...), in nats, float32 at least: 0 where a head is sure, ``log classes`` where it knows nothing.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> round(float(jc.nn.exit_entropy(jnp.zeros(10))), 3)
      2.303
    """
    log = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return -jnp.sum(jnp.where(jnp.exp(log) > 0, jnp.exp(log) * log, 0), axis=-1)


def exit_loss(logits: Sequence[jax.Array], labels: jax.Array, weights: Sequence[float] | None = None) -> jax.Array:
    """The joint loss of all exits, ``sum_e w_e mean cross entropy`` (Teerapittayanon et al. 2016, arXiv:1709.01686).

    Args:
      logits: of each exit, (batch, classes), the last one the network's own.
      labels: integers (batch,).
      weights: of the exits; ones by default.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for another number of weights.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> round(float(jc.nn.exit_loss([jnp.zeros((1, 2))] * 2, jnp.array([0]), weights=(1.0, 0.5))), 3)
      1.04
    """
    found = [1.0] * len(logits) if weights is None else list(weights)
    if len(found) != len(logits):
        raise ValueError(f"exit_loss: found {len(found)} weights of {len(logits)} exits, expected one for each")
    each = [-jnp.take_along_axis(jax.nn.log_softmax(z.astype(jnp.float32)), labels[:, None], 1).mean() for z in logits]
    return jnp.sum(jnp.stack([w * loss for w, loss in zip(found, each, strict=True)]))


def first_exit(entropies: jax.Array, thresholds: Sequence[float] | jax.Array) -> jax.Array:
    """The exit that each example takes: the first whose entropy is below its threshold, or the last one.

    Args:
      entropies: (exits, batch), or those of all exits but the last.
      thresholds: one for each exit but the last; 0 never fires, infinity always does.

    Returns:
      Integers (batch,), from 0 to the number of thresholds.

    Raises:
      ValueError: for another number of exits.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.first_exit(jnp.array([[0.1, 0.9, 0.9], [0.1, 0.1, 0.9]]), [0.5, 0.5]).tolist()
      [0, 1, 2]
    """
    thresholds = jnp.asarray(thresholds)
    n = thresholds.shape[0]
    if entropies.shape[0] not in (n, n + 1):
        raise ValueError(
            f"first_exit: found entropies {entropies.shape} and {n} thresholds, expected one an early exit"
        )
    fires = entropies[:n] < thresholds.reshape(-1, *(1 for _ in entropies.shape[1:]))
    return jnp.argmax(
        jnp.concatenate([fires, jnp.ones_like(fires[:1])]) if n else jnp.ones(entropies.shape, bool), axis=0
    )


def early_exit(
    stages: Sequence[Stage], heads: Sequence[Stage], x: Any, thresholds: Sequence[float] | jax.Array, each: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Run a network until a head is sure (BranchyNet; Teerapittayanon et al. 2016, arXiv:1709.01686).

    Stage ``e`` reads what stage ``e - 1`` gives, head ``e`` what stage ``e`` gives. Two ways, one result: by default
    the batch goes through all stages and each example takes the logits of its exit, which saves nothing and is what
    evaluation needs; with ``each`` one example after the other stops where it leaves (``jax.lax.cond``).

    Args:
      stages: functions of a batch.
      heads: functions of what the stages give, to logits (batch, classes).
      x: a batch, an array.
      thresholds: of entropies, one for each head but the last.
      each: whether examples run one by one.

    Returns:
      ``(logits, exits)``: (batch, classes) and integers (batch,).

    Raises:
      ValueError: if the numbers of stages, heads and thresholds do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> stages, heads = [lambda x: x, lambda x: 9 * x], [lambda x: x, lambda x: x]
      >>> logits, exits = jc.nn.early_exit(stages, heads, jnp.array([[9.0, 0.0], [1.0, 0.0]]), [0.1])
      >>> logits[:, 0].tolist(), exits.tolist()
      ([9.0, 9.0], [0, 1])
    """
    limits = jnp.asarray(thresholds)
    if not len(stages) == len(heads) == limits.shape[0] + 1:
        found = f"{len(stages)} stages, {len(heads)} heads, {limits.shape[0]} thresholds"
        raise ValueError(f"early_exit: found {found}; expected a head a stage, and a threshold for each but the last")
    if each:
        return one_by_one(lambda row: _until(stages, heads, row, limits, 0), x)
    logits = []
    for stage, head in zip(stages, heads, strict=True):
        x = stage(x)
        logits.append(head(x))
    exits = first_exit(jnp.stack([exit_entropy(z) for z in logits]), limits)
    stacked = jnp.stack(logits)
    return jnp.take_along_axis(stacked, exits[None, :, None], axis=0)[0], exits


def _until(stages: Any, heads: Any, x: Any, limits: jax.Array, e: int) -> tuple[jax.Array, jax.Array]:
    """The logits of one example, from stage ``e`` on."""
    y = stages[e](x)
    z = heads[e](y)
    here = z, jnp.full(1, e, jnp.int32)
    if e + 1 == len(stages):
        return here
    sure = exit_entropy(z)[0] < limits[e]
    return jax.lax.cond(sure, lambda _: here, lambda y: _until(stages, heads, y, limits, e + 1), y)


@dataclasses.dataclass(frozen=True)
class Exits:
    """What thresholds of early exits give on labelled examples.

    Attributes:
      thresholds: of entropies, one for each exit but the last.
      shares: of the examples that take each exit, ``p_e``.
      cost: expected, ``sum p_e c_e``, in the units of the costs.
      accuracy: of what the exits answer.

    Example:
      >>> import jcompress as jc
      >>> jc.nn.Exits((0.5,), (0.75, 0.25), cost=1.25, accuracy=0.9).cost
      1.25
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    cost: float
    accuracy: float


def exits_at(logits: Any, labels: Any, costs: Sequence[float], thresholds: Sequence[float]) -> Exits:
    """Expected cost beside accuracy at given thresholds: ``sum_e p_e c_e`` (BranchyNet; Teerapittayanon et al. 2016).

    Args:
      logits: (exits, examples, classes), the last those of the whole network.
      labels: integers (examples,).
      costs: of an example that leaves at each exit, all heads on its way included; such as multiply-adds by
        ``jc.trace.cost``.
      thresholds: one for each exit but the last.

    Returns:
      An :class:`Exits`.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> logits = jnp.array([[[9.0, 0.0], [0.1, 0.0]], [[9.0, 0.0], [0.0, 9.0]]])
      >>> found = jc.nn.exits_at(logits, jnp.array([0, 1]), costs=(1.0, 3.0), thresholds=(0.5,))
      >>> found.cost, found.accuracy
      (2.0, 1.0)
    """
    return _Table("exits_at", logits, labels, costs).at(np.asarray(thresholds, np.float64))


def calibrate_exits(
    logits: Any,
    labels: Any,
    costs: Sequence[float],
    *,
    cost: float | None = None,
    accuracy: float | None = None,
    steps: int = 50,
    unused: bool = False,
) -> Exits:
    """Thresholds of early exits for a cost, or for an accuracy (BranchyNet; Teerapittayanon et al. 2016, 1709.01686).

    From no early exit on, the threshold that loses the fewest right answers for what it saves is raised, a quantile
    of the entropies at a time, until all leave at the first. Of the points on this way, the most accurate within the
    cost is given, or the cheapest of the accuracy. Take examples that trained neither the network nor its heads.

    Args:
      logits: (exits, examples, classes), the last those of the whole network.
      labels: integers (examples,).
      costs: of an example that leaves at each exit, all heads on its way included.
      cost: expected cost that must not be exceeded; this or ``accuracy``.
      accuracy: that must be reached, a share of the examples.
      steps: quantiles that are tried at each exit.
      unused: whether an exit that never fires may stand; its head costs, and saves nothing.

    Returns:
      An :class:`Exits`.

    Raises:
      ValueError: for shapes that do not fit, both or neither of the aims, an aim that no thresholds reach, or an exit
        that never fires.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> labels = jnp.arange(100) % 2
      >>> right = jax.nn.one_hot(labels, 2)
      >>> first = jnp.where(jnp.arange(100)[:, None] < 60, 9.0, -0.1) * right
      >>> found = jc.nn.calibrate_exits(jnp.stack([first, 9 * right]), labels, costs=(1.0, 3.0), cost=2.0)
      >>> round(found.cost, 1), found.accuracy
      (1.8, 1.0)
    """
    if (cost is None) == (accuracy is None):
        raise ValueError(f"calibrate_exits: found cost={cost} and accuracy={accuracy}, expected one of them")
    table = _Table("calibrate_exits", logits, labels, costs)
    way = table.way(steps)
    if cost is not None:
        fit = [point for point in way if point.cost <= cost]
        best = max(fit, key=lambda point: (point.accuracy, -point.cost), default=None)
    else:
        fit = [point for point in way if point.accuracy >= float(accuracy or 0)]
        best = min(fit, key=lambda point: (point.cost, -point.accuracy), default=None)
    if best is None:
        least, most = min(p.cost for p in way), max(p.accuracy for p in way)
        aim = f"cost {cost}" if cost is not None else f"accuracy {accuracy}"
        raise ValueError(
            f"calibrate_exits: no thresholds reach {aim}; the least cost is {least}, the best accuracy {most}"
        )
    idle = [e for e, share in enumerate(best.shares[:-1]) if not share]
    if idle and not unused:
        raise ValueError(
            f"calibrate_exits: exit {idle[0]} never fires at cost {best.cost:.4g} and accuracy {best.accuracy:.4f}; "
            "leave it out, its head costs and saves nothing, or pass unused=True"
        )
    return best


class _Table:
    """Entropies and right answers of all exits."""

    def __init__(self, name: str, logits: Any, labels: Any, costs: Sequence[float]) -> None:
        logits, labels = jnp.asarray(logits), np.asarray(labels)
        if logits.ndim != 3 or labels.shape != logits.shape[1:2] or len(costs) != len(logits) or not labels.size:
            raise ValueError(
                f"{name}: found logits {logits.shape}, labels {labels.shape} and {len(costs)} costs, expected "
                "(exits, examples, classes), (examples,) and a cost for each exit"
            )
        self.entropies = np.asarray(exit_entropy(logits[:-1]), np.float64)
        self.right = np.asarray(logits.argmax(-1)) == labels
        self.costs, self.name = np.asarray(costs, np.float64), name

    def at(self, thresholds: np.ndarray) -> Exits:
        """What thresholds give."""
        if thresholds.shape != (len(self.costs) - 1,):
            raise ValueError(f"{self.name}: found thresholds {thresholds.shape}, expected ({len(self.costs) - 1},)")
        fires = np.concatenate([self.entropies < thresholds[:, None], np.ones((1, self.right.shape[1]), bool)])
        exits = fires.argmax(0)
        shares = np.bincount(exits, minlength=len(self.costs)) / exits.size
        right = self.right[exits, np.arange(exits.size)]
        found = tuple(map(float, thresholds)), tuple(map(float, shares))
        return Exits(*found, float(shares @ self.costs), float(right.mean()))

    def way(self, steps: int) -> list[Exits]:
        """The points on the way from no early exit to the first for all."""
        levels = np.quantile(self.entropies, np.linspace(0, 1, steps + 1)[1:], axis=1).T
        # A value is below the next number, so that the example whose entropy is the quantile leaves as well.
        levels = np.nextafter(levels, np.inf)
        here = self.at(np.zeros(len(self.costs) - 1))
        way = [here]
        while True:
            tried = []
            for e, of_exit in enumerate(levels):
                for level in of_exit[of_exit > here.thresholds[e]]:
                    raised = np.array(here.thresholds)
                    raised[e] = level
                    point = self.at(raised)
                    if point.cost < here.cost:
                        tried.append(((point.accuracy - here.accuracy) / (here.cost - point.cost), point))
            if not tried:
                return way
            here = max(tried, key=lambda found: (found[0], found[1].cost))[1]
            way.append(here)


class EarlyExit(nnx.Module):
    """A network in stages, each with a head: :func:`early_exit` (Teerapittayanon et al. 2016, arXiv:1709.01686).

    Args:
      stages: modules or functions of a batch.
      heads: modules or functions of what the stages give, to logits (batch, classes).
      thresholds: of entropies, one for each head but the last; zeros by default: nothing leaves early.
      rngs: not used.

    Raises:
      ValueError: if their numbers do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> stages, heads = ([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)] for _ in range(2))
      >>> logits, exits = jc.nn.EarlyExit(stages, heads, [jnp.inf])(jnp.ones((3, 4)))
      >>> logits.shape, exits.tolist()
      ((3, 4), [0, 0, 0])
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        heads: Sequence[Stage],
        thresholds: Sequence[float] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        found = (0.0,) * (len(stages) - 1) if thresholds is None else tuple(map(float, thresholds))
        if not len(stages) == len(heads) == len(found) + 1:
            raise ValueError(f"EarlyExit: found {len(stages)} stages, {len(heads)} heads, {len(found)} thresholds")
        self.stages, self.heads, self.thresholds = listed(stages), listed(heads), found

    def __call__(self, x: Any, each: bool = False) -> tuple[jax.Array, jax.Array]:
        """``(logits, exits)``; with ``each`` examples run one by one and stop where they leave."""
        return early_exit(list(self.stages), list(self.heads), x, self.thresholds, each)

    def all_logits(self, x: Any) -> list[jax.Array]:
        """The logits of every exit, for :func:`exit_loss` and :func:`calibrate_exits`."""
        found = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            found.append(head(x))
        return found
