"""Methods whose masks are learned through scores, and the step that makes masks of scores."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import Context, PyTree
from jcompress.formats import Frozen, Scored
from jcompress.formats.scored import mean_magnitude
from jcompress.prune import select as selection
from jcompress.prune.threshold import keep_largest
from jcompress.rules import Plan


@dataclasses.dataclass(frozen=True)
class EdgePopup:
    """Edge-popup: weights stay as they were drawn, only scores learn (Ramanujan et al. 2020, arXiv:1911.13299).

    The mask keeps the weights of largest ``|score|``; a score moves by the gradient of the dense array times the
    weight, sign and all. Scores start uniform in ``+-sqrt(1 / fan_in)``; all axes but the last count as inputs.

    Attributes:
      sparsity: the fraction of zeros: a number, a traced scalar or an optax schedule.
      signs: whether kept weights become ``+-alpha`` with ``alpha`` their mean magnitude, one in each leaf: multi-prize
        tickets (Diffenderfer & Kailkhura 2021, arXiv:2103.09377).

    Raises:
      ValueError: for a sparsity outside [0, 1], or if no key is given.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.arange(1.0, 9.0)}
      >>> plan = jc.plan(params, [("w", jc.prune.dynamic.EdgePopup(sparsity=0.5))])
      >>> small = jc.compress(params, plan, key=jax.random.key(0))
      >>> int((jc.materialize(small)["w"] != 0).sum()), jc.split(small)[0]["w"].weights
      (4, Frozen())
    """

    sparsity: Any
    signs: bool = False
    needs = ("key",)

    __repr__ = core.method_repr

    def __post_init__(self) -> None:
        _check_sparsity(self)

    def mask(self, scores: jax.Array, step: Any = 0) -> jax.Array:
        """What the scores keep."""
        return _largest(self, jnp.abs(scores), step)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Scored:
        """The node for one array."""
        bound = (math.prod(w.shape[:-1]) or 1) ** -0.5
        draws = jax.random.uniform(context.key, w.shape, jnp.float32, -bound, bound)
        scores = jnp.zeros_like(w, jnp.float32) + draws
        mask = self.mask(scores, context.step)
        scale = Frozen.of(mean_magnitude(w, mask, tuple(range(-w.ndim, 0)))) if self.signs else None
        return Scored(Frozen.of(w), scores, mask, scale)


@dataclasses.dataclass(frozen=True)
class Movement:
    """Movement pruning: weights and scores learn together (Sanh et al. 2020, arXiv:2005.07683).

    A score moves by the gradient of the dense array times the weight, so under plain descent at rate eta it is
    ``-eta * sum(g * w)``: weights that move away from zero gain. Hard: the mask keeps the largest scores. Soft: it
    keeps scores above a threshold, with :func:`score_penalty` in the loss. Scores start at 0.

    Attributes:
      sparsity: the fraction of zeros, hard: a number, a traced scalar or an optax schedule.
      threshold: soft: the score from which a weight is kept; below 0, for all are to start in.

    Raises:
      ValueError: unless exactly one of the two is given, or for a sparsity outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.dynamic.Movement(sparsity=0.5)(jnp.array([1.0, 2.0]))
      >>> node.mask.tolist(), node.scores.tolist()
      ([True, False], [0.0, 0.0])
    """

    sparsity: Any = None
    threshold: float | None = None

    __repr__ = core.method_repr

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError(
                f"Movement: found sparsity={self.sparsity}, threshold={self.threshold}; give a sparsity (hard) or a "
                "threshold (soft)"
            )
        _check_sparsity(self)

    def mask(self, scores: jax.Array, step: Any = 0) -> jax.Array:
        """What the scores keep."""
        return _largest(self, scores, step) if self.threshold is None else scores > self.threshold

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Scored:
        """The node for one array."""
        scores = jnp.zeros_like(w, jnp.float32)
        return Scored(jnp.copy(w), scores, self.mask(scores, context.step))


@dataclasses.dataclass(frozen=True)
class Piggyback:
    """Piggyback: one mask a task over weights that stay as they are (Mallya et al. 2018, arXiv:1801.06519).

    The mask keeps scores of at least the threshold; backward it counts as the identity. Scores start at ``initial``
    everywhere, so the first mask keeps all.

    Attributes:
      threshold: the score from which a weight is kept.
      initial: the first score.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.dynamic.Piggyback()(jnp.array([1.0, -2.0])).materialize().tolist()
      [1.0, -2.0]
    """

    threshold: float = 5e-3
    initial: float = 1e-2

    __repr__ = core.method_repr

    def mask(self, scores: jax.Array, step: Any = 0) -> jax.Array:
        """What the scores keep."""
        return scores >= self.threshold

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Scored:
        """The node for one array."""
        scores = jnp.full_like(w, self.initial, jnp.float32)
        return Scored(Frozen.of(w), scores, self.mask(scores))


def select(tree: PyTree, plan: Plan, step: Any = 0) -> PyTree:
    """Choose the masks of all :class:`jcompress.formats.Scored` nodes anew from their scores.

    Call it on the merged tree inside the loss, for masks that follow the scores at every step, or outside now and
    then, which is cheaper. No gradient passes through the choice; ``Scored`` passes it straight through. Works under
    ``jit``.

    Args:
      tree: parameters with nodes, of the structure the plan was made for.
      plan: the plan that made the nodes.
      step: the step at which sparsities that are schedules are read.

    Returns:
      The tree with new masks.

    Raises:
      ValueError: if a ``Scored`` node stands where the plan has no method that chooses by scores.

    Example:
      >>> import dataclasses, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> plan = jc.plan(params, [("w", jc.prune.dynamic.Movement(sparsity=0.5))])
      >>> small = jc.compress(params, plan)
      >>> learned = {"w": dataclasses.replace(small["w"], scores=jnp.array([0.0, 1.0]))}
      >>> jc.materialize(jc.prune.dynamic.select(learned, plan))["w"].tolist()
      [0.0, 2.0]
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=core.is_node)
    named = zip([path for path, _ in rules.paths(tree)], leaves, strict=True)
    return jax.tree.unflatten(treedef, [_selected(path, x, plan, step) for path, x in named])


def _selected(path: str, node: Any, plan: Plan, step: Any) -> Any:
    if not isinstance(node, Scored):
        return node
    method, scores = plan.get(path), jax.lax.stop_gradient(node.scores)
    inner, stacks = method, 0
    while inner is not None and not hasattr(inner, "mask") and hasattr(inner, "method"):
        inner, stacks = inner.method, stacks + 1
    if inner is None or not hasattr(inner, "mask"):
        raise ValueError(f"{path}: found {method!r} for a Scored node; expected a method that chooses by scores")

    def chosen(x: jax.Array) -> jax.Array:
        return inner.mask(x, step)

    for _ in range(stacks):
        chosen = jax.vmap(chosen)
    return node.choose(chosen(scores))


def score_penalty(tree: PyTree) -> jax.Array:
    """``sum(sigmoid(scores))`` over all ``Scored`` nodes: the penalty of soft movement pruning, to be scaled and added.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.dynamic.Movement(threshold=-2.0)(jnp.ones(4))
      >>> float(jc.prune.dynamic.score_penalty({"w": node}))
      2.0
    """
    nodes = [x for x in jax.tree.leaves(tree, is_leaf=core.is_node) if isinstance(x, Scored)]
    return sum((jnp.sum(jax.nn.sigmoid(x.scores)) for x in nodes), jnp.zeros(()))


def _check_sparsity(method: Any) -> None:
    sparsity = method.sparsity
    if sparsity is not None and not callable(sparsity) and core.is_concrete(sparsity):
        selection.check_sparsity(type(method).__name__, sparsity)


def _largest(method: Any, scores: jax.Array, step: Any) -> jax.Array:
    number = selection.kept(scores.size, core.value_at(method.sparsity, step))
    return keep_largest([scores], number)[0]
