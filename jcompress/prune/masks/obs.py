"""Optimal brain surgeon: weights are removed one at a time, and the others make up for each."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Masked
from jcompress.layers import matrices
from jcompress.numeric import extremes, scaling
from jcompress.numeric.damping import damped, inverse_factor
from jcompress.prune.masks import selection
from jcompress.prune.masks.patterns import NM

_HIGHEST = lax.Precision.HIGHEST


def obs_saliency(w: jax.Array, inverse: jax.Array) -> jax.Array:
    """``w_q**2 / (2 [H^-1]_qq)``: what removing one weight costs, once the others have moved to make up for it.

    Args:
      w: (k,) weights, or (k, n) with outputs last that share the Hessian.
      inverse: (k, k), the inverse of the Hessian.

    Returns:
      The saliencies, in the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.obs_saliency(jnp.array([2.0, 4.0]), jnp.diag(jnp.array([1.0, 4.0]))).tolist()
      [2.0, 2.0]

    Reference: Hassibi & Stork 1992.
    """
    diagonal = jnp.diagonal(inverse)
    return jnp.square(w) / (2 * (diagonal if w.ndim == 1 else diagonal[:, None]))


def obs_step(w: jax.Array, inverse: jax.Array, index: Any) -> jax.Array:
    """The change of all weights that removes one at least cost: ``dw = -(w_q / [H^-1]_qq) H^-1 e_q``.

    The minimum of ``dw^T H dw / 2`` subject to ``e_q^T dw + w_q = 0``.

    Args:
      w: (k,) weights.
      inverse: (k, k), the inverse of the Hessian.
      index: q, which may be traced.

    Returns:
      (k,), to be added to ``w``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> inverse = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> jc.prune.obs_step(jnp.array([2.0, 4.0]), inverse, 0).tolist()
      [-2.0, -1.0]
    """
    return -(w[index] / inverse[index, index]) * inverse[:, index]


def inverse_hessian(x: jax.Array, damping: Any = 1e-6) -> jax.Array:
    """``(damping I + X^T X / n)^-1`` by one rank-one update for each row of ``X``, without any factorization.

    ``H^-1 <- H^-1 - (H^-1 x x^T H^-1) / (n + x^T H^-1 x)``, from ``H^-1 = I / damping`` (Hassibi & Stork 1992, with
    damping from 1e-8 to 1e-4). It is the root ``S`` of ``H^-1 = S S^T`` that is updated, by ``S (I - c v v^T)`` with
    ``v = S^T x`` (Potter 1963): it stays positive, and the relative error is at most about
    ``eps (E x_i^2 / damping)^1/2``, the root of what it is otherwise: 0.0003 at 1e-8 for inputs of size 1 in float32.

    Args:
      x: (n, k), the gradients or inputs.
      damping: positive; a traced scalar works too.

    Returns:
      (k, k), of the dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.inverse_hessian(jnp.array([[1.0], [1.0]]), damping=1.0).round(3).tolist()
      [[0.5]]
    """
    n, k = x.shape

    def add(root: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        seen = jnp.matmul(root.T, row, precision=_HIGHEST)
        total = n + jnp.vdot(seen, seen, precision=_HIGHEST)
        part = seen / (total + jnp.sqrt(n * total))
        return root - jnp.outer(jnp.matmul(root, seen, precision=_HIGHEST), part), None

    start = jnp.eye(k, dtype=x.dtype) / jnp.sqrt(jnp.asarray(damping, x.dtype))
    root = lax.scan(add, start, x)[0]
    return jnp.matmul(root, root.T, precision=_HIGHEST)


def _surgeon(
    w: jax.Array, shown: jax.Array, hessian: jax.Array, inverse: jax.Array, steps: Any, pattern: NM | None
) -> tuple[jax.Array, jax.Array]:
    """Weights (k,) of one output, and their mask, after ``steps`` removals of least cost."""
    k = len(w)
    group = jnp.arange(k) // (k if pattern is None else pattern.m)
    # No entry of an inverse's diagonal is smaller; rounding may make it so.
    least = jnp.diag(1 / jnp.diagonal(hessian))

    def remove(_: Any, state: tuple) -> tuple:
        w, inverse, alive = state
        cost = jnp.where(alive, obs_saliency(w, inverse), jnp.inf)
        cost = jnp.where(alive & ~shown, -1.0, cost)
        if pattern is not None:
            cut = jax.ops.segment_sum((~alive).astype(jnp.int32), group, k // pattern.m)
            cost = jnp.where(cut[group] < pattern.m - pattern.n, cost, jnp.inf)
        q = extremes.argmin(cost)
        column, pivot = inverse[:, q], inverse[q, q]
        gone = jnp.arange(k) == q
        # The row and column of the weight that is gone become those of the identity, so that nothing divides by zero.
        rest = inverse - jnp.outer(column, column) / pivot
        rest = jnp.where(least > 0, jnp.maximum(rest, least), rest)
        rest = jnp.where(gone[:, None] | gone, jnp.eye(k, dtype=rest.dtype), rest)
        left = alive & ~gone
        return jnp.where(left, w - (w[q] / pivot) * column, 0), rest, left

    left, inverse, alive = lax.fori_loop(0, steps, remove, (w, inverse, jnp.ones(k, jnp.bool_)))
    # Rounding has added up over the removals; one round of refinement takes it out.
    residual = jnp.matmul(hessian, w - left, precision=_HIGHEST)
    taken = jnp.matmul(inverse, jnp.where(alive, residual, 0), precision=_HIGHEST)
    return jnp.where(alive, left + taken, 0), alive


@dataclasses.dataclass(frozen=True)
class OBS(Method):
    """Layer-wise optimal brain surgeon: remove the weight of least saliency, move the others, and so on.

    For each output, with ``H`` the Gram matrix of the inputs: the weight of least ``w_q**2 / (2 [H^-1]_qq)`` is
    removed, the others move by ``-(w_q / [H^-1]_qq) H^-1 e_q``, and ``H^-1`` loses the row and column. What stays is
    exactly the least squares fit of the outputs on the inputs that are kept. Each output keeps ``k - round(sparsity *
    k)`` of its ``k`` weights. Time is ``sparsity * k**3`` for each output, memory ``k**2`` for each that is treated at
    a time: for small layers; :class:`SparseGPT` for large ones. Needs the statistic ``gram``. Gathers a sharded kernel.

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      pattern: :class:`NM` over the contracted inputs in their order, or None.
      damping: added to the Gram matrix, as a fraction of its mean diagonal, and raised where that leaves it singular.

    Raises:
      ValueError: for a sparsity outside [0, 1], one that disagrees with the pattern, another pattern, or statistics
        that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.0], [3.0]])}
      >>> plan = jc.plan(params, [("w", jc.prune.OBS(sparsity=0.5, damping=0.0))])
      >>> batches = [jnp.array([[1.0, 1.0], [1.0, 0.0]])]
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, batches, plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].materialize().round(3).tolist()
      [[0.0], [4.0]]

    Reference: Hassibi & Stork 1992; by layers, Dong et al. 2017, arXiv:1705.07565; exact and by outputs, Frantar &
    Alistarh 2022, arXiv:2208.11580.
    """

    sparsity: Any = None
    pattern: NM | None = None
    damping: Any = 1e-4

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    scope: ClassVar[selection.Scope] = "output"

    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_pattern(self)
        selection.validate(self)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the pattern does not fit the shape."""
        if len(shape) == 2:
            selection.check(self, path, shape)

    def unit(self, shape: tuple[int, ...]) -> int:
        """How many weights the sparsity of a leaf of this shape can change by, at least."""
        return selection.unit(self, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Masked:
        """The node for one array."""
        layer, gram = matrices.of(w, context, "gram")
        matrix, shown = layer.matrix(), matrices.visible(layer, context)
        size, k = scaling.unit([matrix]), matrix.shape[1]
        check_groups(self, context.path, k)
        sparsity = self.pattern.sparsity if self.pattern is not None else core.value_at(self.sparsity, context.step)
        if core.is_concrete(sparsity):
            selection.check_sparsity(f"{context.path}: OBS", sparsity)
        steps = k - jnp.asarray(selection.kept(k, sparsity), jnp.int32)

        def layer_of(args: tuple) -> tuple:
            matrix, shown, gram = args
            hessian = damped(gram, self.damping)
            factor = inverse_factor(hessian)
            inverse = jnp.matmul(factor.T, factor, precision=_HIGHEST)
            start = jnp.where(shown, size.divide(matrix), 0)
            one = partial(_surgeon, hessian=hessian, inverse=inverse, steps=steps, pattern=self.pattern)
            values, mask = lax.map(lambda x: one(*x), (start.T, shown.T))
            return size.saturated(values.T), mask.T

        if not w.size:
            return Masked(w, jnp.zeros(w.shape, jnp.bool_))
        values, mask = lax.map(layer_of, (matrix, shown, gram))
        return matrices.masked(layer, values, mask)


def check_pattern(method: Any) -> None:
    """Raise for a pattern that these methods cannot follow."""
    if method.pattern is not None and not isinstance(method.pattern, NM):
        name = type(method).__name__
        raise ValueError(f"{name}: found pattern={method.pattern}, expected NM(n, m) or None; use jc.prune.Magnitude")


def check_groups(method: Any, path: str, k: int) -> None:
    """Raise if the contracted inputs do not come in whole groups of the pattern."""
    if method.pattern is not None and k % method.pattern.m:
        raise ValueError(
            f"{path}: {method.pattern} needs groups of {method.pattern.m}, found {k} contracted inputs; choose another "
            "m or keep it dense"
        )
