"""Proximal gradient descent: penalties whose zeros are exact, and the optax transforms that apply them.

A penalty here has a value, ``penalty(x)``, and a proximal operator, ``penalty.prox(x, step)``, the minimum over v of
``||v - x||**2 / 2 + step * penalty(v)``. For units that span several arrays see
:func:`jcompress.prune.structured.group_lasso_proximal`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.numeric import shrinkage
from jcompress.prune.structured.training import matching, moving

__all__ = ["L1", "AcceleratedState", "ElasticNet", "GrOWL", "GroupLasso", "Penalty", "accelerated", "transform"]


class Penalty(Protocol):
    """A penalty on one array."""

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """The value, a float32 scalar."""
        ...

    def prox(self, x: jax.Array, step: Any, /) -> jax.Array:
        """The minimum over v of ``||v - x||**2 / 2 + step * penalty(v)``."""
        ...


@dataclasses.dataclass(frozen=True)
class L1:
    """``strength * sum |x|``, the lasso (Tibshirani 1996). Its proximal operator is soft thresholding.

    Attributes:
      strength: of the penalty, not negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune.penalties import proximal
      >>> proximal.L1(1.0).prox(jnp.array([3.0, -0.5]), 0.5).tolist()
      [2.5, -0.0]
    """

    strength: Any

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """The value."""
        return self.strength * jnp.abs(x.astype(jnp.float32)).sum()

    def prox(self, x: jax.Array, step: Any, /) -> jax.Array:
        """Soft thresholding by ``step * strength``."""
        return shrinkage.soft_threshold(x, step * self.strength)


@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """``l1 * sum |x| + l2 * sum x**2 / 2`` (Zou & Hastie 2005).

    Attributes:
      l1: strength of the sum of magnitudes.
      l2: strength of half the sum of squares.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune.penalties import proximal
      >>> proximal.ElasticNet(1.0, 1.0).prox(jnp.array([3.0, 0.5]), 1.0).tolist()
      [1.0, 0.0]
    """

    l1: Any
    l2: Any

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """The value."""
        x = x.astype(jnp.float32)
        return self.l1 * jnp.abs(x).sum() + 0.5 * self.l2 * jnp.square(x).sum()

    def prox(self, x: jax.Array, step: Any, /) -> jax.Array:
        """Soft thresholding by ``step * l1``, then division by ``1 + step * l2``."""
        return (shrinkage.soft_threshold(x, step * self.l1) / (1 + step * self.l2)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class GroupLasso:
    """``strength * sum_g ||x_g||`` over groups of one array (SSL; Wen et al. 2016, arXiv:1608.03665).

    The axes say what forms a group. For a convolution kernel (height, width, in, out) ``(-4, -3, -2)`` are filters,
    ``(-4, -3, -1)`` channels, ``(-1,)`` shapes: one position of all filters. For a kernel (in, out) ``(-1,)`` are rows
    and ``(-2,)`` columns.

    Attributes:
      strength: of the penalty, not negative.
      axes: negative axes that belong to one group.
      weighted: multiply a norm by the root of the number of weights in its group (Yuan & Lin 2006), which matters where
        groups of different arrays are to be compared.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune.penalties import proximal
      >>> proximal.GroupLasso(2.5, axes=(-2,)).prox(jnp.array([[3.0, 0.1], [4.0, 0.1]]), 1.0).tolist()
      [[1.5, 0.0], [2.0, 0.0]]
    """

    strength: Any
    axes: tuple[int, ...] = (-1,)
    weighted: bool = False

    def _norms(self, x: jax.Array) -> jax.Array:
        square = jnp.square(x.astype(jnp.float32)).sum(self.axes, keepdims=True)
        # The root has no derivative at zero: there the branch that is not taken must be finite as well.
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    def _strength(self, x: jax.Array) -> Any:
        return self.strength * (math.sqrt(math.prod(x.shape[axis] for axis in self.axes)) if self.weighted else 1)

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """The value; its gradient at a group that is zero is zero."""
        return self._strength(x) * self._norms(x).sum()

    def prox(self, x: jax.Array, step: Any, /) -> jax.Array:
        """Every group shrinks, ``x_g max(1 - step * strength / ||x_g||, 0)``."""
        return (x * shrinkage.shrink_factor(self._norms(x), step * self._strength(x))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class GrOWL:
    """``sum_i weights_i ||row||_[i]``: the i-th largest norm of a row pays the i-th weight (Zhang et al. 2018).

    Group ordered weighted l1, of "Learning to share" (ICLR 2018). The weights fall linearly, ``weights_i = strength +
    slope * (n - i)`` for i from 1 to n. Rows of norms near each other are drawn together, so that the rows that survive
    form clusters whose weights can be shared. With a slope of zero this is the group lasso. All norms of an array are
    sorted, so under sharding they are gathered; the array is not.

    Attributes:
      strength: the weight of the smallest norm, not negative.
      slope: how much more the next larger norm pays, not negative.
      axis: the negative axis of rows: -2, the inputs of an (in, out) kernel. A row is all at one index of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune.penalties import proximal
      >>> rows = jnp.array([[0.0, 5.0], [4.5, 0.0], [0.25, 0.0]])
      >>> proximal.GrOWL(0.5, 0.5).prox(rows, 1.0).tolist()
      [[0.0, 3.5], [3.5, 0.0], [0.0, 0.0]]
    """

    strength: Any
    slope: Any
    axis: int = -2

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of rows."""
        return (self.axis,)

    def _norms(self, x: jax.Array) -> jax.Array:
        others = tuple(i for i in range(-x.ndim, 0) if i != self.axis)
        return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(others))

    def weights(self, n: int) -> jax.Array:
        """The n weights, from the largest to the smallest."""
        return self.strength + self.slope * jnp.arange(n - 1, -1, -1, dtype=jnp.float32)

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """The value."""
        norms = self._norms(x)
        return (self.weights(norms.size) * jnp.sort(norms, descending=True)).sum()

    def prox(self, x: jax.Array, step: Any, /) -> jax.Array:
        """Rows keep their direction; their norms are those of :func:`jcompress.prune.shrinkage.ordered_shrink`."""
        norms = self._norms(x)
        shrunk = shrinkage.ordered_shrink(norms, step * self.weights(norms.size))
        factor = jnp.where(norms > 0, shrunk / jnp.where(norms > 0, norms, 1), 0)
        return (x * factor.reshape(factor.shape + (1,) * (-1 - self.axis))).astype(x.dtype)


def _prox(penalty: Penalty, path: str, x: jax.Array, step: Any) -> jax.Array:
    wrong = [axis for axis in getattr(penalty, "axes", ()) if not -x.ndim <= axis < 0]
    if wrong:
        raise ValueError(
            f"{path}: found shape {x.shape}, which has no axes {wrong} for {penalty}; choose its arrays with match="
        )
    return penalty.prox(x, step)


def transform(
    penalty: Penalty, learning_rate: optax.ScalarOrSchedule, match: str = ".*"
) -> optax.GradientTransformation:
    """Apply a penalty's proximal operator after each step: an optax transform, last in the chain.

    After ``optax.sgd(learning_rate)`` this is proximal gradient descent (ISTA), which converges to the minimum of the
    penalized loss if the learning rate is below one over the largest curvature. Zeros are exact, and a gradient can
    bring a weight back. After another optimizer it is the usual heuristic: the same operator at the same rate.

    Args:
      penalty: one of this module, or anything with ``prox(x, step)``.
      learning_rate: the step of the operator, that of the optimizer, or the same schedule.
      match: a regular expression for the paths of the parameters that are penalized.

    Returns:
      A ``GradientTransformation``; ``update`` must be given ``params``.

    Raises:
      ValueError: if nothing matches, an array lacks the axes of the penalty, or ``update`` is called without
        ``params``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jcompress.prune.penalties import proximal
      >>> params = {"w": jnp.array([1.0, -0.05])}
      >>> tx = optax.chain(optax.sgd(0.5), proximal.transform(proximal.L1(0.5), 0.5))
      >>> updates, _ = tx.update({"w": jnp.array([1.0, 0.0])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [0.25, 0.0]
    """

    def shrink(new: dict[str, jax.Array], steps: jax.Array) -> dict[str, jax.Array]:
        rate = core.value_at(learning_rate, steps)
        return {path: _prox(penalty, path, x, rate) for path, x in matching("transform", new, match).items()}

    return moving("transform", shrink)


class AcceleratedState(NamedTuple):
    """The steps taken, Nesterov's t, and the iterate, whose zeros are exact."""

    steps: jax.Array
    t: jax.Array
    iterate: PyTree


def accelerated(
    penalty: Penalty, learning_rate: optax.ScalarOrSchedule, match: str = ".*"
) -> optax.GradientTransformation:
    """FISTA: proximal gradient descent with Nesterov's momentum (Beck & Teboulle 2009), an optimizer of its own.

    ``x' = prox(y - learning_rate * grad(y))``, ``t' = (1 + sqrt(1 + 4 t**2)) / 2`` and ``y' = x' + (t - 1) /
    t' (x' - x)``. The parameters are the points y where gradients are wanted. The answer, with exact zeros, is
    ``state.iterate``.
    Generative adversarial learning trains its soft masks so (GAL; Lin et al. 2019, arXiv:1903.09291): see
    :func:`jcompress.prune.structured.generator_loss`.

    Args:
      penalty: one of this module, or anything with ``prox(x, step)``.
      learning_rate: at most one over the largest curvature for the rate of 1 / steps**2 to hold; or a schedule.
      match: a regular expression for the paths of the parameters that are penalized; the others have the momentum only.

    Returns:
      A ``GradientTransformation``, to be given raw gradients and ``params``.

    Raises:
      ValueError: as for :func:`transform`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jcompress.prune.penalties import proximal
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = proximal.accelerated(proximal.L1(0.5), 0.5)
      >>> state = tx.init(params)
      >>> for _ in range(30):
      ...     grads = {"w": params["w"] - jnp.array([2.0, 0.3])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state.iterate["w"].round(2).tolist()
      [1.5, 0.0]
    """

    def init(params: PyTree) -> AcceleratedState:
        return AcceleratedState(jnp.zeros((), jnp.int32), jnp.ones(()), jax.tree.map(jnp.copy, params))

    def update(
        updates: PyTree, state: AcceleratedState, params: PyTree | None = None
    ) -> tuple[PyTree, AcceleratedState]:
        if params is None:
            raise ValueError("accelerated needs the parameters: call tx.update(grads, state, params)")
        rate = core.value_at(learning_rate, state.steps)
        moved = jax.tree.map(lambda y, g: (y - rate * g).astype(y.dtype), params, updates)
        chosen = matching("accelerated", dict(rules.paths(moved)), match)
        shrunk = [_prox(penalty, path, y, rate) if path in chosen else y for path, y in rules.paths(moved)]
        iterate = jax.tree.unflatten(jax.tree.structure(moved), shrunk)
        t = 0.5 * (1 + jnp.sqrt(1 + 4 * state.t**2))
        ahead = (state.t - 1) / t
        change = jax.tree.map(
            lambda new, old, y: (new + ahead * (new - old) - y).astype(y.dtype), iterate, state.iterate, params
        )
        return change, AcceleratedState(optax.safe_increment(state.steps), t, iterate)

    return optax.GradientTransformation(init, update)
