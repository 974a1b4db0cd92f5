"""Codes in a function: few rows of an activation meet the words of a codebook, or a part of the weight at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Layout
from jcompress.formats import Arranged, Codebook, Coded, Rotated
from jcompress.numeric import meshes
from jcompress.trace.core import walk
from jcompress.trace.core.contraction import Dot, Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Cast, Permutation
from jcompress.trace.core.views import View
from jcompress.trace.execution import rows
from jcompress.trace.execution.grouped import ROWS, SMALL, added_up, at_a_time
from jcompress.trace.execution.rows import Lookup
from jcompress.trace.execution.weights import Multiply, Tell, Weight, static

LEAST = 2**16
"""Of fewer entries a part at a time takes longer than all of them."""
SHARE = 4
"""Partial products of words are tables of this many numbers an output, or fewer, where they are looked up."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Words:
    """A codebook or a computed code, of a matrix or of stacked ones.

    Attributes:
      node: a :class:`Codebook` or :class:`Coded`, its codebook or scale dense.
      signs: of the rotation of its inputs, or None.
      layout: what the axes of the value are; None for single values, which lie like those that they stand for.
      sizes: the lengths of the axes that the layout names.
      path: the parameter.
      dtype: of what it stands for.
    """

    node: Any
    signs: Any = None
    layout: Layout | None = static(None)
    sizes: tuple[int, ...] = static(())
    path: str = static("")
    dtype: Any = static(None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self._lead + self.sizes if self.layout else self.node.shape

    @property
    def _lead(self) -> tuple[int, ...]:
        return self.node.shape[:-2] if self.layout else ()

    def dense(self) -> jax.Array:
        """The array it stands for."""
        node = self.node if self.signs is None else Rotated(self.node, self.signs)
        dense = node.materialize()
        return (self.layout.restore(dense, self.sizes) if self.layout else dense).astype(self.dtype)

    def _weight(self, why: str = "") -> Weight:
        name = type(self.node if self.signs is None else Rotated(None, None)).__name__
        note = f"{name} is made dense" + (f", {why}" if why else "")
        return Weight(self.dense(), dtype=self.dtype, path=self.path, note=note)

    def laid_out(self, step: Step) -> list[Words] | None:
        """As for :class:`Weight`; what is not transposed is made dense."""
        if not isinstance(step.flow, (Cast, Permutation)) or not all(isinstance(k, View) for k in step.outs):
            return None
        if isinstance(step.flow, Cast):
            return [dataclasses.replace(self, dtype=walk.aval(step.eqn.outvars[0]).dtype)]
        n = len(self.shape)
        places = [step.flow.place(step.eqn, axis) for axis in range(n)]
        if None in places or self._lead:
            return None
        order = [places.index(d) for d in range(n)]
        if self.layout is None:
            return [self._transposed(order)] if self.node.codebook.ndim == 1 else None
        named: dict[str, Any] = {
            name: tuple(places[a + n] - n for a in getattr(self.layout, name)) for name in ("inputs", "outputs")
        }
        return [dataclasses.replace(self, layout=Layout(**named), sizes=tuple(self.sizes[d] for d in order))]

    def _transposed(self, order: list[int]) -> Words:
        return dataclasses.replace(
            self, node=dataclasses.replace(self.node, indices=self.node.indices.transpose(order))
        )

    def stacked(self) -> Words | Weight:
        """As for :class:`Weight`; dense where its slices are rows."""
        n, node, signs = self.shape[0], self.node, self.signs
        if len(node.shape) < 3 or (self.layout and not self._lead):
            return self._weight("sliced").stacked()
        if isinstance(node, Coded):
            node = dataclasses.replace(node, scale=jnp.broadcast_to(node.scale, (n, *node.scale.shape[1:])))
        elif node.indices.ndim == node.ndim:  # one codebook for all layers: each turn takes it as it is
            shared = jnp.broadcast_to(node.codebook, (n, *node.codebook.shape))
            node = dataclasses.replace(node, codebook=shared, ndim=node.ndim - 1)
        return dataclasses.replace(self, node=node, signs=signs)

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation: by partial products, a part of the weight at a time, or with all of it."""
        why, axis = self._axis(product)
        few = self._few(product, x, axis) if isinstance(product, Dot) and not why else None
        if few is None or isinstance(few, str):
            return multiply(product, x, self._weight(few or why))
        node, y, how = few
        tell(node, how)
        return y

    def _axis(self, product: Product) -> tuple[str, int]:
        """Why the product is made with the dense array, if it is; and the axis of the matrix that it sums."""
        if type(product) is not Dot:
            return "in a convolution", 0
        if self._lead or product.numbers[1][0] or any(map(meshes.is_explicit, jax.tree.leaves(self.node))):
            return "in several products at once, or sharded", 0
        if self.layout is None:
            return ("" if self.node.codebook.ndim == 1 else "of stacked layers"), 0
        n = len(self.sizes)
        for axis, mine in enumerate((self.layout.inputs, self.layout.outputs)):
            if sorted(product.contracted) == sorted(a + n for a in mine) and (axis == 0 or self.signs is None):
                return "", axis
        return "contracted over other axes", 0

    def _few(self, product: Dot, x: jax.Array, axis: int) -> tuple[tuple[int, ...], jax.Array, str] | str:
        """The shape, the product for few rows, and how it was made; else why it was not."""
        n = len(self.shape)
        if self.layout is None:
            mine = [d - n for d in product.contracted]
            theirs = [d for d in range(-n, 0) if d not in mine]
            turned = self if n == 2 else self._transposed([d + n for d in (*mine, *theirs)])
            axis = product.contracted[0] if n == 2 else 0
            sizes = [math.prod(self.shape[d] for d in axes) for axes in (mine, theirs)]
            indices = turned.node.indices if n == 2 else turned.node.indices.reshape(sizes)
            node = dataclasses.replace(self.node, indices=indices, ndim=2)
        else:
            mine, theirs = (list(self.layout.inputs), list(self.layout.outputs))[:: 1 - 2 * axis]
            node = self.node
        flat, restored = rows.flattened(product, x, self.shape, mine, theirs)
        size, other = node.shape[axis], node.shape[1 - axis]
        count, part = flat.size // max(size, 1), at_a_time(node.shape, axis, _unit(node, axis))
        if count > ROWS:
            return f"for {count} rows"
        blocks = _words_of_inputs(node) if axis == 0 else 0
        by_tables = blocks > 0 and count <= blocks and count * node.clusters <= SHARE * other
        if size * other < (SMALL if by_tables else LEAST) or part >= size:
            return "for a small weight"
        if self.signs is not None:
            turned_x = Rotated(None, self.signs).rotate(jnp.swapaxes(flat, -1, -2))
            flat = jnp.swapaxes(turned_x, -1, -2).astype(x.dtype)
        second = product.with_matrix(flat, flat.ndim - 1, axis)

        def by_parts(flat: jax.Array, node: Any) -> jax.Array:
            def piece(start: Any, length: int) -> jax.Array:
                return _part(node, axis, start, length).materialize().astype(self.dtype)

            return added_up(second, flat, axis, size, part, piece)

        if by_tables:
            y = self._by_tables(product, flat, node, by_parts)
            return self.shape, restored(y), f"partial products of {node.clusters} words, looked up"
        return self.shape, restored(by_parts(flat, node)), f"codes, {part} of {size} rows made dense at a time"

    def _by_tables(self, product: Dot, flat: jax.Array, node: Codebook, plain: Any) -> jax.Array:
        """The products of each block of inputs with all words; of each block an output takes the one of its word."""

        def looked_up(flat: jax.Array, indices: jax.Array, words: jax.Array) -> jax.Array:
            wide = jnp.float32
            x = flat.reshape(-1, indices.shape[0], node.block[0]).astype(wide)
            words = words.astype(self.dtype).astype(wide)
            tables = jnp.einsum("rbd,kd->bkr", x, words, precision=product.eqn.params["precision"])

            def step(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
                table, place = pair
                return total + table.at[place.astype(jnp.int32)].get(mode="clip"), None

            y = jax.lax.scan(step, jnp.zeros((indices.shape[1], x.shape[0]), wide), (tables, indices))[0]
            return y.T.reshape(*flat.shape[:-1], -1).astype(product.dtype)

        def as_dense(flat: jax.Array, indices: jax.Array, words: jax.Array) -> jax.Array:
            return plain(flat, dataclasses.replace(node, indices=indices, codebook=words))

        return rows.with_derivative_of(as_dense, looked_up, flat, node.indices, node.codebook)

    def looked_up(self, lookup: Lookup) -> jax.Array | None:
        """As for :class:`Weight`; None where its rows are not apart."""
        if self.signs is not None or len(self.shape) != 2 or self._lead:
            return None
        axis = 0 if self.layout is None or self.layout.inputs == (-2,) else 1
        unit = _unit(self.node, axis)

        def row(i: jax.Array) -> jax.Array:
            return jnp.take(_part(self.node, axis, i // unit * unit, unit).materialize(), i % unit, axis=axis)

        at = jnp.clip(lookup.at.reshape(-1), 0, lookup.length - 1)
        return lookup.restored(jax.vmap(row)(at).astype(self.dtype))


def _unit(node: Any, axis: int) -> int:
    """How many positions along an axis a word stands for."""
    return (1, 1, *node.block)[-2:][axis]


def _words_of_inputs(node: Any) -> int:
    """How many inputs of one output a word of a codebook stands for; 0 for other words."""
    return node.block[0] if isinstance(node, Codebook) and len(node.block) == 2 and node.block[1] == 1 else 0


def _part(node: Codebook | Coded, axis: int, start: Any, count: int) -> Codebook | Coded:
    """Some positions along an axis of a matrix, from the first of a word to the last of one."""
    if isinstance(node, Codebook):
        unit = _unit(node, axis)
        indices = jax.lax.dynamic_slice_in_dim(node.indices, start // unit, count // unit, axis)
        return dataclasses.replace(node, indices=indices)
    unit = _unit(node, axis) if node.code == "e8p" else 1
    codes = jax.lax.dynamic_slice_in_dim(node.codes, start // unit, count // unit, axis)
    scale = node.scale if node.scale.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(node.scale, start, count, axis)
    return dataclasses.replace(node, codes=codes, scale=scale)


def of_words(path: str, leaf: Any) -> Words | None:
    """The operand of a codebook or a computed code, rotated, arranged or not; None for another leaf."""
    inner, layout = (leaf.inner, leaf.layout) if isinstance(leaf, Arranged) else (leaf, None)
    inner, signs = (inner.values, inner.signs) if isinstance(inner, Rotated) else (inner, None)
    if not isinstance(inner, (Codebook, Coded)) or len(inner.shape) < 2 or len(inner.block) > 2:
        return None
    if layout is not None and (layout.batch or layout.window or layout.groups > 1):
        return None
    if isinstance(inner, Codebook):
        inner = dataclasses.replace(inner, codebook=core.dense(inner.codebook))
        plain = None if not inner.block and signs is None else Layout()
    else:
        inner, plain = dataclasses.replace(inner, scale=core.dense(inner.scale)), Layout()
    sizes = tuple(leaf.sizes) if layout else inner.shape[-2:] if plain else ()
    return Words(inner, signs, layout=layout or plain, sizes=sizes, path=path, dtype=leaf.dtype)
