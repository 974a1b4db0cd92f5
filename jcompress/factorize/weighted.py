"""Low rank under another norm than that of the weights: of the outputs, or of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.subspaces import check_rank
from jcompress.factorize.svd import chosen_rank
from jcompress.formats import LowRank
from jcompress.formats.lowrank import truncated_svd
from jcompress.layers import matrices

_HIGH = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class WhitenedSVD(Method):
    """The low rank that moves the outputs least over the calibration data: least ``tr(dW^T gram dW)``.

    With ``gram = R R^T``, the best approximation of ``R^T W``, times ``R^-T``: closed, and never worse in the outputs
    than :class:`SVD` of the same rank (Chen et al. 2021, DRONE; Wang et al. 2024, arXiv:2403.07378). ``R`` comes from
    eigenvectors, so Gram matrices that are singular do no harm: what was never met, and is therefore free, is fitted as
    much as ``damping`` weighs it. Needs the statistic ``gram``.

    Attributes:
      rank: the rank, or the share of the numbers that is kept, in (0, 1).
      damping: added to the Gram matrix, as a fraction of its mean diagonal.

    Raises:
      ValueError: for a rank above the limit, or statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> plan = jc.plan(params, [("w", jc.factorize.WhitenedSVD(rank=1, damping=1e-6))])
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[0.1, 10.0]])], plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].materialize().round(2)[1].tolist()
      [0.029999999329447746, 1.0]
    """

    rank: int | float
    damping: float = 1e-4

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)

    def __post_init__(self) -> None:
        check_rank("WhitenedSVD", self.rank)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix or the rank exceeds its smaller side."""
        chosen_rank("WhitenedSVD", path, self.rank, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> LowRank:
        """The node for one array."""
        layer, gram = matrices.of(w, context, "gram")
        rank = chosen_rank("WhitenedSVD", context.path, self.rank, w.shape[layer.lead :])
        u, v = jax.vmap(lambda w, gram: _under(w, gram, rank, self.damping))(layer.matrix(), gram)
        u = u.reshape(*w.shape[:-1], rank).astype(w.dtype)
        return LowRank(u, v.reshape(*w.shape[: layer.lead], rank, w.shape[-1]).astype(w.dtype))


def _under(w: jax.Array, gram: jax.Array, rank: int, damping: float) -> tuple[jax.Array, jax.Array]:
    """Factors of the best approximation of a float32 (k, n) where a change counts ``tr(dW^T gram dW)``."""
    values, vectors = jnp.linalg.eigh(gram)
    mean = jnp.maximum(jnp.mean(jnp.diagonal(gram)), jnp.finfo(jnp.float32).tiny)
    roots = jnp.sqrt(jnp.maximum(values, 0) / mean + max(damping, 1e-12))[:, None]
    # In the eigenvectors' coordinates the root is diagonal.
    turned = roots * jnp.matmul(vectors.T, w, precision=_HIGH)
    u, v = truncated_svd(turned, rank)
    return jnp.matmul(vectors, u / roots, precision=_HIGH), v


@dataclasses.dataclass(frozen=True)
class FisherSVD(Method):
    """The low rank that moves the loss least, if the weights of an input count alike (Hsu 2022, arXiv:2207.00112).

    Each row is weighed by the root of the sum of its squared gradients, and the weights divided out again. Needs the
    statistic ``grad_square``, from ``jc.calibrate(loss, params, batches, plan=plan)``.

    Attributes:
      rank: the rank, or the share of the numbers that is kept, in (0, 1).

    Raises:
      ValueError: for a rank above the limit, or if the statistic is missing.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> stats = jc.trace.Stats(grad_square=jnp.array([[0.0001, 0.0], [100.0, 0.0]]))
      >>> node = jc.factorize.FisherSVD(rank=1)(jnp.array([[3.0, 0.0], [0.0, 1.0]]), jc.Context(stats=stats))
      >>> node.materialize().round(2).tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """

    rank: int | float

    reads: ClassVar[tuple[str, ...]] = ("stats.grad_square",)

    def __post_init__(self) -> None:
        check_rank("FisherSVD", self.rank)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix or the rank exceeds its smaller side."""
        chosen_rank("FisherSVD", path, self.rank, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> LowRank:
        """The node for one array."""
        rank = chosen_rank("FisherSVD", context.path, self.rank, w.shape)
        matrix = w.reshape(-1, w.shape[-1]).astype(jnp.float32)
        rows = jnp.asarray(context.stats.grad_square, jnp.float32).reshape(matrix.shape).sum(1)
        # Rows without gradients count a little, or their weights would be lost.
        weights = jnp.sqrt(jnp.maximum(rows, 1e-6 * jnp.mean(rows)))[:, None]
        weights = jnp.where(jnp.max(weights, initial=0) > 0, weights, 1)
        u, v = truncated_svd(weights * matrix, rank)
        return LowRank((u / weights).reshape(*w.shape[:-1], rank).astype(w.dtype), v.astype(w.dtype))
