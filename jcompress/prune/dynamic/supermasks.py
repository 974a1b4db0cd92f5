"""Methods whose masks are learned through scores, and the step that makes masks of scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import Context, Method, PyTree
from jcompress.formats import Frozen, Scored
from jcompress.formats.scored import mean_magnitude
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.masks import selection
from jcompress.rules import Plan

Scope = Literal["leaf", "global"]


@dataclasses.dataclass(frozen=True)
class EdgePopup(Method):
    """Edge-popup: weights stay as they were drawn, only scores learn (Ramanujan et al. 2020, arXiv:1911.13299).

    The mask keeps the weights of largest score; a score moves by the gradient of the dense array times the weight,
    sign and all, so an edge that would lower the loss rises and one that harms it falls. Scores start uniform in
    ``+-sqrt(1 / fan_in)``; all axes but the last count as inputs. The authors' programs rank ``|score|`` and pass the
    gradient through the magnitude: the same but for scores that cross zero, which they reflect.

    With ``signs`` these are multi-prize tickets, MPT-1/32. Activations of one bit as well, MPT-1/1, are a matter of the
    model: let it call ``jc.quantize.training.sign_ste`` where it called a ReLU.

    Attributes:
      sparsity: the fraction of zeros: a number, a traced scalar or an optax schedule.
      signs: whether kept weights become ``+-alpha`` with ``alpha`` their mean magnitude, one in each leaf: multi-prize
        tickets (Diffenderfer & Kailkhura 2021, arXiv:2103.09377).
      scope: ``"leaf"``, a threshold for each leaf, or ``"global"``, one for all leaves of the rule. A global one may
        cut a leaf through: ramp the sparsity up by a schedule.

    Raises:
      ValueError: for a sparsity outside [0, 1], an unknown scope, or if no key is given.

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
    scope: Scope = "leaf"
    reads: ClassVar[tuple[str, ...]] = ("key",)

    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def joint(self) -> bool:
        """Whether one threshold serves all leaves of the rule."""
        return self.scope == "global"

    def masks(self, scores: Sequence[jax.Array], step: Any = None) -> list[jax.Array]:
        """What the scores of some leaves keep."""
        return _largest(self, scores, step)

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Scored]:
        """One node for each array of the rule."""
        scores = [_uniform(w, context.key) for w, context in zip(arrays, contexts, strict=True)]
        masks = self.masks(scores, contexts[0].step)
        return [self._node(*each) for each in zip(arrays, scores, masks, strict=True)]

    def _node(self, w: jax.Array, scores: jax.Array, mask: jax.Array) -> Scored:
        scale = Frozen.of(mean_magnitude(w, mask, tuple(range(-w.ndim, 0)))) if self.signs else None
        return Scored(Frozen.of(w), scores, mask, scale)


def _uniform(w: jax.Array, key: jax.Array) -> jax.Array:
    bound = (math.prod(w.shape[:-1]) or 1) ** -0.5
    return jnp.zeros_like(w, jnp.float32) + jax.random.uniform(key, w.shape, jnp.float32, -bound, bound)


@dataclasses.dataclass(frozen=True)
class Movement(Method):
    """Movement pruning: weights and scores learn together (Sanh et al. 2020, arXiv:2005.07683).

    A score moves by the gradient of the dense array times the weight, so under plain descent at rate eta it is
    ``-eta * sum(g * w)``: weights that move away from zero gain. Hard: the mask keeps the largest scores. Soft: it
    keeps scores above a threshold, with :func:`score_penalty` in the loss. Scores start at 0.

    Attributes:
      sparsity: the fraction of zeros, hard: a number, a traced scalar or an optax schedule.
      threshold: soft: the score above which a weight is kept, in all leaves; below 0, for all are to start in.
      scope: hard: ``"leaf"``, a threshold for each leaf, or ``"global"``, one for all leaves of the rule. As all scores
        start equal, ramp a global sparsity up from 0, or the last leaves are cut first.

    Raises:
      ValueError: unless exactly one of the first two is given, for a sparsity outside [0, 1], or an unknown scope.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.dynamic.Movement(sparsity=0.5)(jnp.array([1.0, 2.0]))
      >>> node.mask.tolist(), node.scores.tolist()
      ([True, False], [0.0, 0.0])
    """

    sparsity: Any = None
    threshold: float | None = None
    scope: Scope = "leaf"

    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError(
                f"Movement: found sparsity={self.sparsity}, threshold={self.threshold}; give a sparsity (hard) or a "
                "threshold (soft)"
            )
        _check(self)

    @property
    def joint(self) -> bool:
        """Whether one threshold serves all leaves of the rule."""
        return self.scope == "global"

    def masks(self, scores: Sequence[jax.Array], step: Any = None) -> list[jax.Array]:
        """What the scores of some leaves keep."""
        return _largest(self, scores, step) if self.threshold is None else [x > self.threshold for x in scores]

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Scored]:
        """One node for each array of the rule."""
        scores = [jnp.zeros_like(w, jnp.float32) for w in arrays]
        masks = self.masks(scores, contexts[0].step)
        return [Scored(jnp.copy(w), *each) for w, *each in zip(arrays, scores, masks, strict=True)]


@dataclasses.dataclass(frozen=True)
class Piggyback(Method):
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

    whole: ClassVar[bool] = True

    def masks(self, scores: Sequence[jax.Array], step: Any = None) -> list[jax.Array]:
        """What the scores of some leaves keep."""
        return [x >= self.threshold for x in scores]

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Scored:
        """The node for one array."""
        scores = jnp.full_like(w, self.initial, jnp.float32)
        return Scored(Frozen.of(w), scores, *self.masks([scores]))


def select(tree: PyTree, plan: Plan, step: Any = None) -> PyTree:
    """Choose the masks of all :class:`jcompress.formats.Scored` nodes anew from their scores, those of a rule together.

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
    found, treedef = rules.paths(tree), jax.tree.structure(tree, is_leaf=core.is_node)
    nodes = {path: x for path, x in found if isinstance(x, Scored)}
    chosen: dict[str, jax.Array] = {}
    for unit in plan.units(nodes):
        choose = _chooser(unit[0], plan.get(unit[0]), step)
        masks = choose([jax.lax.stop_gradient(core.dense(nodes[path].scores)) for path in unit])
        chosen |= dict(zip(unit, masks, strict=True))
    return jax.tree.unflatten(treedef, [x.choose(chosen[path]) if path in chosen else x for path, x in found])


def _chooser(path: str, method: Any, step: Any) -> Any:
    """The function from the scores of some leaves to their masks; layer by layer where layers are stacked."""
    inner, stacks = method, 0
    while inner is not None and not hasattr(inner, "masks") and hasattr(inner, "method"):
        inner, stacks = inner.method, stacks + 1
    if inner is None or not hasattr(inner, "masks"):
        raise ValueError(f"{path}: found {method!r} for a Scored node; expected a method that chooses by scores")

    def choose(scores: list[jax.Array]) -> list[jax.Array]:
        return inner.masks(scores, step)

    for _ in range(stacks):
        choose = jax.vmap(choose)
    return choose


def score_penalty(tree: PyTree) -> jax.Array:
    """``sum(sigmoid(scores))`` over all ``Scored`` nodes: the penalty of soft movement pruning, to be scaled and added.

    Args:
      tree: any pytree of arrays and nodes.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.dynamic.Movement(threshold=-2.0)(jnp.ones(4))
      >>> float(jc.prune.dynamic.score_penalty({"w": node}))
      2.0
    """
    nodes = [x for x in jax.tree.leaves(tree, is_leaf=core.is_node) if isinstance(x, Scored)]
    return sum((jnp.sum(jax.nn.sigmoid(core.dense(x.scores))) for x in nodes), jnp.zeros((), jnp.float32))


def _check(method: Any) -> None:
    name, sparsity = type(method).__name__, method.sparsity
    if method.scope not in ("leaf", "global"):
        raise ValueError(f"{name}: scope={method.scope!r} is unknown; use 'leaf' or 'global'")
    if sparsity is not None and not callable(sparsity) and core.is_concrete(sparsity):
        selection.check_sparsity(name, sparsity)


def _largest(method: Any, scores: Sequence[jax.Array], step: Any) -> list[jax.Array]:
    sparsity = core.value_at(method.sparsity, step)
    if method.scope == "global":
        return keep_largest(scores, selection.kept(sum(x.size for x in scores), sparsity))
    return [keep_largest([x], selection.kept(x.size, sparsity))[0] for x in scores]
