"""Rows that training drew together, stored once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Codebook


@dataclasses.dataclass(frozen=True)
class TiedRows(Method):
    """Inputs whose weights are alike have one row of weights: the ties that GrOWL learns (Zhang et al. 2018).

    ``jc.prune.penalties.GrOWL`` in ``proximal`` draws the rows of correlated inputs together and others to zero. Rows
    are put together, most alike first, while those of two groups have a mean cosine of ``similarity`` or more (average
    linkage, in the place of the paper's affinity propagation); rows of norm zero, or below ``least`` of the largest,
    are one group, whose row is zero. The node is a ``Codebook`` whose words are the rows: an index for each input, and
    each row once, the mean of its group. What then trains are the rows, tied. Reads values, so it works outside ``jit``
    only and not on stacked layers, and gathers a sharded leaf; its time is cubic in the inputs.

    Attributes:
      similarity: the least mean cosine, in (-1, 1].
      least: norms below this share of the largest are zero.

    Raises:
      ValueError: under ``jit`` and for stacked layers, for a vector, or a number outside its range.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[1.0, 2.0], [1.0, 2.1], [0.0, 0.0], [3.0, -1.0]])
      >>> node = jc.share.TiedRows()(w)
      >>> node.clusters, node.materialize()[:, 1].round(2).tolist()
      (3, [2.049999952316284, 2.049999952316284, 0.0, -1.0])
    """

    similarity: float = 0.9
    least: float = 1e-3

    def __post_init__(self) -> None:
        if not -1 < self.similarity <= 1 or not 0 <= self.least < 1:
            raise ValueError(
                f"TiedRows: similarity={self.similarity}, least={self.least}; expected them in (-1, 1] and [0, 1)"
            )

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for a vector."""
        if len(shape) < 2:
            raise ValueError(f"{path}: TiedRows needs inputs and outputs, found shape {shape}; keep it dense")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Codebook:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        if not core.is_concrete(w):
            raise ValueError(
                f"{context.path}: TiedRows reads the values, so it works outside jit only, and not on stacked layers, "
                "experts or groups, whose numbers of rows would differ; give each a leaf of its own"
            )
        shown = w if context.where is None else jnp.where(context.where, w, jnp.zeros_like(w))
        x = np.moveaxis(np.asarray(shown, np.float64), -2, 0)
        groups, alive = _grouped(x.reshape(len(x), -1), self.similarity, self.least)
        clusters = max(int(groups.max(initial=-1)) + 1, 1)
        if clusters > 65_536:
            raise ValueError(f"{context.path}: found {clusters} groups of rows, expected at most 65536; ask for less")
        dtype = jnp.uint8 if clusters <= 256 else jnp.uint16
        block = (*w.shape[:-2], 1, w.shape[-1])
        indices = jnp.asarray(groups).reshape(*[1] * (w.ndim - 2), -1, 1).astype(dtype)
        return Codebook(indices, None, clusters, w.ndim, block).project(jnp.where(alive[:, None], shown, 0))


def _grouped(rows: np.ndarray, similarity: float, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The group of each row, numbered by their first rows, and which rows are not zero."""
    norms = np.linalg.norm(rows, axis=1)
    alive = np.flatnonzero(norms > least * norms.max(initial=0.0))
    unit = rows[alive] / norms[alive, None]
    alike, size = unit @ unit.T, np.ones(len(alive))
    np.fill_diagonal(alike, -np.inf)
    owner = np.arange(len(alive))
    while len(alive) > 1:
        i, j = sorted(np.unravel_index(np.argmax(alike), alike.shape))
        if not alike[i, j] >= similarity - 1e-9:
            break
        joint = (size[i] * alike[i] + size[j] * alike[j]) / (size[i] + size[j])
        alike[i], alike[:, i] = joint, joint
        alike[i, i], alike[j], alike[:, j] = -np.inf, -np.inf, -np.inf
        owner[owner == j], size[i] = i, size[i] + size[j]
    groups = np.full(len(rows), -1)
    groups[alive] = owner
    _, first, found = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[found], groups >= 0
