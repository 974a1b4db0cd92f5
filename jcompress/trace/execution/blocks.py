"""Masks of whole blocks: an activation meets the blocks that are kept, and no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.formats import Masked
from jcompress.trace.core.contraction import Dot, Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Permutation
from jcompress.trace.execution.weights import Multiply, Tell, Weight, static

SIZES = (64, 32, 16)
FEW = 8
"""Rows of an activation up to which reading the weight takes the time, so that half of it takes half."""
WORTH = {64: 0.3, 32: 0.25, 16: 0.1}
"""The part of the blocks, by their size, up to which the kept ones are faster for many rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix of which whole blocks are zero.

    Which ones must be known when the function is compiled, as where the tree is a constant of it.

    Attributes:
      values: the matrix, hidden entries zero.
      kept: bytes of a boolean matrix, an entry a block.
      size: of the blocks, which are square.
      path: the parameter.
      kernels: that may multiply it, as for :func:`jcompress.accelerate`.
    """

    values: Any
    kept: bytes = static()
    size: int = static()
    path: str = static("")
    kernels: Any = static(None)

    @property
    def mask(self) -> np.ndarray:
        """Which blocks are kept."""
        return np.frombuffer(self.kept, bool).reshape([n // self.size for n in self.values.shape])

    def dense(self) -> jax.Array:
        """The array it stands for."""
        return self.values

    def laid_out(self, step: Step) -> list[Blocks] | None:
        """Transposed; what is laid out otherwise is dense."""
        if not isinstance(step.flow, Permutation) or not core.is_concrete(self.values):
            return None
        if step.flow.place(step.eqn, 0) != 1:
            return None
        with jax.ensure_compile_time_eval():
            return [dataclasses.replace(self, values=self.values.T, kept=self.mask.T.tobytes())]

    def stacked(self) -> Weight:
        """As for :class:`Weight`: slices of it are rows."""
        return self._weight("sliced").stacked()

    def _weight(self, why: str) -> Weight:
        return Weight(self.values, dtype=self.values.dtype, path=self.path, note=f"Masked is made dense, {why}")

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation: of the blocks, where that is faster."""
        if not isinstance(product, Dot) or len(product.contracted) != 1 or product.numbers[1][0]:
            return multiply(product, x, self._weight("for another product than of matrices"))
        if not core.is_concrete(self.values):
            return multiply(product, x, self._weight("inside a loop"))
        if self.kernels is not None and (made := self.kernels.blocks(product, x, self.values, self.mask)) is not None:
            tell(self.values.shape, made[1])
            return made[0]
        (axis,), (summed,) = product.contracted, product.summed
        share, rows = float(self.mask.mean()), x.size // max(self.values.shape[axis], 1)
        if share > (0.5 if rows <= FEW else WORTH[self.size]):
            return multiply(product, x, self._weight(f"{share:.0%} of its blocks are no less work"))
        tell(self.values.shape, f"{share:.0%} of its blocks of {self.size}x{self.size}")
        y = self._multiplied(jnp.moveaxis(x, summed, -1), axis, product)
        y = y if product.side else jnp.moveaxis(y, -1, 0)
        return y.astype(product.dtype)

    def _multiplied(self, x: jax.Array, axis: int, product: Dot) -> jax.Array:
        """Contracted over the last axis of ``x``: for each block of outputs the inputs that it keeps."""
        mask = self.mask if axis == 0 else self.mask.T
        columns, most, size = mask.shape[1], max(int(mask.sum(0).max(initial=0)), 1), self.size
        order = np.argsort(~mask, axis=0, kind="stable")[:most].T  # kept blocks first; the others are zero
        with jax.ensure_compile_time_eval():
            w = self.values if axis == 0 else self.values.T
            blocks = w.reshape(mask.shape[0], size, columns, size).transpose(2, 0, 1, 3)
            blocks = blocks[np.arange(columns)[:, None], order].reshape(columns, most * size, size)
        inputs = (order[..., None] * size + np.arange(size)).reshape(-1)
        met = jnp.take(x.reshape(-1, x.shape[-1]), inputs, axis=-1, unique_indices=False, mode="clip")
        met = met.reshape(-1, columns, most * size)
        wide = jnp.promote_types(jnp.promote_types(x.dtype, w.dtype), product.dtype)
        numbers = (((2,), (1,)), ((1,), (0,)))
        precision = product.eqn.params["precision"]
        y = jax.lax.dot_general(met, blocks, numbers, precision, preferred_element_type=wide)
        return y.transpose(1, 0, 2).reshape(*x.shape[:-1], -1)


def of_blocks(path: str, leaf: Any, kernels: Any = None) -> Blocks | None:
    """The operand of a masked matrix whose mask is known and hides whole blocks; None for another leaf."""
    if not isinstance(leaf, Masked) or core.is_node(leaf.values):
        return None
    if not all(map(core.is_concrete, jax.tree.leaves(leaf))):
        return None
    if len(leaf.shape) != 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    mask = np.broadcast_to(np.asarray(leaf.mask), leaf.shape)
    for size in SIZES:
        if any(n % size or not n for n in mask.shape):
            continue
        blocks = mask.reshape(mask.shape[0] // size, size, mask.shape[1] // size, size)
        kept = blocks.any((1, 3))
        if (blocks.all((1, 3)) == kept).all() and kept.mean() <= 0.5:
            with jax.ensure_compile_time_eval():
                return Blocks(leaf.materialize(), kept=kept.tobytes(), size=size, path=path, kernels=kernels)
    return None
