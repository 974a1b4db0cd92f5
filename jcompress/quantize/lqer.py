"""Low-rank corrections of what quantization changed."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import LowRank, Sum
from jcompress.formats.lowrank import truncated_svd
from jcompress.layers import matrices
from jcompress.numeric import scaling
from jcompress.numeric.damping import cholesky, damped
from jcompress.quantize.integer import Int


@dataclasses.dataclass(frozen=True)
class LQER(Method):
    """A quantized matrix plus one of low rank that takes back most of the error of outputs.

    For the error ``E = w - q(w)``, ``"gram"`` minimizes ``tr((E - u v)^T gram (E - u v))`` over all factors of that
    rank, by the singular value decomposition of ``C^T E`` where ``C C^T`` is the damped Gram matrix (Zhang et al. 2024,
    arXiv:2410.06040). ``"diagonal"`` takes the diagonal alone: rows weighted by the norms of their inputs (Zhang et al.
    2024, arXiv:2402.02446). Without weights it is ``jc.residual(grid, jc.factorize.SVD(rank))`` (also Luo et al. 2024,
    arXiv:2408.00923, who search the ranks under a budget). Needs the statistic ``gram``. The factors are 32-bit floats,
    or smaller by ``jc.chain(LQER(...), ...)``. Gathers a sharded matrix.

    Attributes:
      rank: of the correction.
      grid: the method that quantizes.
      by: ``"gram"`` or ``"diagonal"``.
      damping: added to the Gram matrix, as a fraction of its mean diagonal, and raised where that leaves it singular.

    Raises:
      ValueError: for a rank below 1, another ``by``, a leaf whose contracted axes are not all but the last, or
        statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.0, 0.3], [0.2, 0.9]])}
      >>> plan = jc.plan(params, [("w", jc.quantize.LQER(rank=1, grid=jc.quantize.Int(bits=2)))])
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [jnp.eye(2)], plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].terms[1]
      LowRank(u=float32[2,1], v=float32[1,2])
    """

    rank: int
    grid: Method = Int(bits=4)
    by: Literal["gram", "diagonal"] = "gram"
    damping: float = 1e-4

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    wraps: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LQER: rank={self.rank} must be positive")
        if self.by not in ("gram", "diagonal"):
            raise ValueError(f"LQER: by={self.by!r} is unknown; use 'gram' or 'diagonal'")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Sum:
        """The node for one array."""
        layer, gram = matrices.of(w, context, "gram")
        if layer.split > 1 or layer.axes != tuple(range(layer.lead, w.ndim - 1)):
            raise ValueError(
                f"{context.path}: LQER needs a kernel that contracts all but its last axis, found shape {w.shape} "
                f"contracted over {[i - w.ndim for i in layer.axes]}; use the grid alone"
            )
        quantized = self.grid(w, context)
        if not w.size:
            shapes = (*w.shape[:-1], self.rank), (*w.shape[: layer.lead], self.rank, w.shape[-1])
            u, v = (jnp.zeros(shape, jnp.float32) for shape in shapes)
            return Sum((quantized, LowRank(u.astype(w.dtype), v.astype(w.dtype))))
        left = layer.of(w - core.dense(quantized)).matrix()
        u, v = jax.vmap(partial(_factors, rank=self.rank, by=self.by))(left, self._damped(gram))
        u = u.reshape(*w.shape[:-1], u.shape[-1]).astype(w.dtype)
        return Sum((quantized, LowRank(u, v.reshape(*w.shape[: layer.lead], *v.shape[1:]).astype(w.dtype))))

    def _damped(self, gram: jax.Array) -> jax.Array:
        return jax.vmap(lambda g: damped(g, self.damping))(gram)


def _factors(left: jax.Array, gram: jax.Array, rank: int, by: str) -> tuple[jax.Array, jax.Array]:
    unit = scaling.unit([left])
    left = unit.divide(left)
    if by == "diagonal":
        norms = jnp.sqrt(jnp.diagonal(gram))[:, None]
        u, v = truncated_svd(norms * left, rank)
        return u / norms * unit.root, v * unit.root
    root, _ = cholesky(gram)
    u, v = truncated_svd(jnp.matmul(root.T, left, precision=jax.lax.Precision.HIGHEST), rank)
    return jax.scipy.linalg.solve_triangular(root, u, lower=True, trans=1) * unit.root, v * unit.root
