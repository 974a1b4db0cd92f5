"""Singular vectors of -1, 0 and 1: products become additions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Method
from jcompress.factorize.rank_choice import check_on_host
from jcompress.factorize.subspaces import check_filled
from jcompress.formats import Quantized, ShiftAdd
from jcompress.formats.network import TensorNetwork


@dataclasses.dataclass(frozen=True)
class TernarySVD(Method):
    """``W ~ U diag(s) V`` with ``U`` and ``V`` of -1, 0 and 1 (Chen et al. 2023, arXiv:2308.07641).

    Greedy: the leading singular vectors of what is left are made ternary, by the fewest entries whose cosine with them
    reaches ``cosine``, and then all ``s`` are fitted anew. It trades multiplications, one a rank and input, for
    additions, one for each nonzero of ``U`` and ``V``, and **not for bytes**: at 2 bits an entry the factors are often
    larger than 8-bit weights. The rank depends on the values, so it works outside ``jit`` only, on the host, where a
    sharded matrix is gathered.

    Attributes:
      tolerance: it stops when the largest singular value left is less than this part of the first.
      cosine: of a ternary vector with the singular vector, where some entries reach it.
      rank: the most terms; by default four times the smaller side.

    Raises:
      ValueError: for a tolerance or a cosine outside (0, 1), or under ``jit``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.factorize.TernarySVD(tolerance=0.1)(jnp.array([[2.0, -2.0], [2.0, -2.0]]))
      >>> node.materialize().tolist(), jnp.abs(node.factors[0].codes).tolist()
      ([[2.0, -2.0], [2.0, -2.0]], [[1], [1]])
    """

    tolerance: float = 0.1
    cosine: float = 0.8386
    rank: int | None = None

    def __post_init__(self) -> None:
        if not (0 < self.tolerance < 1 and 0 < self.cosine < 1):
            raise ValueError(f"TernarySVD: tolerance={self.tolerance} and cosine={self.cosine} must lie in (0, 1)")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix."""
        if len(shape) < 2:
            raise ValueError(f"{path}: TernarySVD needs a matrix, found shape {shape}; keep it dense")
        check_filled("TernarySVD", path, shape)

    whole: ClassVar[bool] = True

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array; stacked layers have as many terms as one of them needs, the others some of size 0."""
        layers, shape = w.shape[: context.batch], w.shape[context.batch :]
        self.check(context.path, shape, w.dtype)
        check_on_host("TernarySVD", context.path, "rank", w)
        matrices = np.asarray(w, np.float64).reshape(math.prod(layers), -1, shape[-1])
        most = 4 * min(matrices.shape[1:]) if self.rank is None else self.rank
        found = [_greedy(matrix, self.tolerance, self.cosine, max(most, 1)) for matrix in matrices]
        rank = max((s.size for _, s, _ in found), default=1)
        left, s, right = (
            np.stack([_filled(parts[i], axis, rank) for parts in found]) for i, axis in enumerate((1, 0, 0))
        )
        window = "uvwxyz"[: len(shape) - 2]
        factors = (
            _codes(left.reshape(*layers, *shape[:-1], rank), len(layers), w.dtype),
            jnp.asarray(s.reshape(*layers, rank), w.dtype),
            _codes(right.reshape(*layers, rank, shape[-1]), len(layers), w.dtype),
        )
        return TensorNetwork(factors, f"{window}ir,r,rj->{window}ij", (1,) * len(shape))


def _filled(x: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """With terms of size 0 beside those that there are."""
    return np.pad(x, [(0, rank - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _codes(x: np.ndarray, layers: int, dtype: Any) -> Quantized:
    """Entries of -1, 0 and 1 in two bits each; the scale of one, for each layer, is held."""
    codes, axes = jnp.asarray(x, jnp.int8), tuple(range(layers - x.ndim, 0))
    one = jnp.ones((*x.shape[:layers], *[1] * len(axes)), jnp.float8_e8m0fnu)
    return Quantized(codes, one, bits=2, axes=axes, dtype=np.dtype(dtype))


def _greedy(w: np.ndarray, tolerance: float, cosine: float, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, right, s = np.zeros((len(w), 0)), np.zeros((0, w.shape[1])), np.zeros(0)
    rest, first = w, None
    while s.size < most:
        u, values, v = np.linalg.svd(rest, full_matrices=False)
        first = values[0] if first is None else first
        if not values.size or not values[0] > (tolerance * first if s.size else 0):
            break
        # Several at a time while they are large beside the limit, or each would cost a decomposition.
        count = min(most - s.size, max(1, int((values > 0.7 * values[0]).sum())))
        pairs = [(ternarized(u[:, i], cosine), ternarized(v[i], cosine)) for i in range(count)]
        left = np.concatenate([left, np.stack([a for a, _ in pairs], 1)], 1)
        right = np.concatenate([right, np.stack([b for _, b in pairs])])
        gram = (left.T @ left) * (right @ right.T)
        wanted = np.einsum("ir,ij,rj->r", left, w, right, optimize=True)
        s = np.linalg.lstsq(gram + 1e-9 * np.mean(np.diag(gram)) * np.eye(len(gram)), wanted, rcond=None)[0]
        rest = w - (left * s) @ right
    if not s.size:
        return np.zeros((len(w), 1)), np.zeros(1), np.zeros((1, w.shape[1]))
    return left, s, right


def ternarized(vector: np.ndarray, cosine: float) -> np.ndarray:
    """The ternary vector of fewest nonzeros whose cosine with a unit vector is enough, or else the nearest one."""
    order = np.argsort(-np.abs(vector), kind="stable")
    found = np.cumsum(np.abs(vector[order])) / np.sqrt(np.arange(1, vector.size + 1))
    enough = np.flatnonzero(found >= cosine)
    count = (enough[0] if enough.size else int(np.argmax(found))) + 1
    kept = np.zeros_like(vector)
    kept[order[:count]] = np.where(vector[order[:count]] < 0, -1, 1)
    return kept


def additions(node: TensorNetwork | ShiftAdd) -> tuple[int, int]:
    """Additions and multiplications for one input of a node that :class:`TernarySVD` or :class:`LCC` gave.

    Args:
      node: the node.

    Returns:
      Additions and multiplications. Of ternary vectors one for each nonzero, and one for each term. Of shifts one fewer
      than there are nonzeros in a row and one fewer than there are blocks for each output, and its scale.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.factorize.additions(jc.factorize.TernarySVD()(jnp.array([[2.0, -2.0], [2.0, -2.0]])))
      (4, 1)
    """
    if isinstance(node, ShiftAdd):
        rows = [np.count_nonzero(np.asarray(x), axis=-1) for x in (node.first, node.codes)]
        blocks, outputs = node.first.shape[-3:-1]
        inside = sum(int(np.maximum(count - 1, 0).sum()) for count in rows)
        return inside + (blocks - 1) * outputs, outputs
    left, s, right = node.factors
    return sum(int(np.count_nonzero(np.asarray(x.codes))) for x in (left, right)), int(np.size(s))
