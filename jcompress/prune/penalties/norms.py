"""Penalties whose proximal operators have a closed form and give exact zeros."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jcompress.numeric import shrinkage


class Penalty(Protocol):
    """A penalty on one array, with its proximal operator (Parikh & Boyd 2014, Proximal algorithms).

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import penalties
      >>> float(penalties.L1(2.0)(jnp.array([1.0, -1.0])))
      4.0
    """

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
      >>> from jcompress.prune import penalties
      >>> penalties.L1(1.0).prox(jnp.array([3.0, -0.5]), 0.5).tolist()
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
      >>> from jcompress.prune import penalties
      >>> penalties.ElasticNet(1.0, 1.0).prox(jnp.array([3.0, 0.5]), 1.0).tolist()
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
      >>> from jcompress.prune import penalties
      >>> penalties.GroupLasso(2.5, axes=(-2,)).prox(jnp.array([[3.0, 0.1], [4.0, 0.1]]), 1.0).tolist()
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
      >>> from jcompress.prune import penalties
      >>> rows = jnp.array([[0.0, 5.0], [4.5, 0.0], [0.25, 0.0]])
      >>> penalties.GrOWL(0.5, 0.5).prox(rows, 1.0).tolist()
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
        """Rows keep their direction; their norms are those of :func:`jcompress.numeric.shrinkage.ordered_shrink`."""
        norms = self._norms(x)
        shrunk = shrinkage.ordered_shrink(norms, step * self.weights(norms.size))
        factor = jnp.where(norms > 0, shrunk / jnp.where(norms > 0, norms, 1), 0)
        return (x * factor.reshape(factor.shape + (1,) * (-1 - self.axis))).astype(x.dtype)
