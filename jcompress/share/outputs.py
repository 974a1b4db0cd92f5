"""Codebooks chosen by the error of a layer's outputs: the Gram matrix of its inputs weighs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcompress.core import Context
from jcompress.layers import matrices
from jcompress.layers.matrices import Contraction
from jcompress.numeric.blocks import blocked
from jcompress.numeric.damping import damped
from jcompress.numeric.entropy import code_lengths

_ROUNDS, _SWEEPS, _STEPS, _DAMPING = 4, 2, 16, 0.01
HIGHEST = lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """The layers of one leaf, their inputs in the order of blocks: ``d`` inputs and ``e`` outputs a block.

    Attributes:
      w: float32 (layers, k, n); zero where a mask hides it.
      gram: float32 (layers, k, k), damped.
      shown: (layers, k, n), 1 where an entry counts; or None.
      codes: int32 (layers, k / d, n / e).
      d: inputs a block.
      e: outputs a block.
    """

    w: jax.Array
    gram: jax.Array
    shown: jax.Array | None
    codes: jax.Array
    d: int = dataclasses.field(metadata={"static": True})
    e: int = dataclasses.field(metadata={"static": True})

    def quantized(self, words: jax.Array) -> jax.Array:
        """The weights as words (clusters, d, e) give them, (layers, k, n)."""
        found = words[self.codes].transpose(0, 1, 3, 2, 4).reshape(self.w.shape)
        return found if self.shown is None else found * self.shown

    def by_word(self, x: jax.Array, clusters: int) -> jax.Array:
        """The transpose of :meth:`quantized`: sums of (layers, k, n) by word, (clusters, d, e)."""
        x = x if self.shown is None else x * self.shown
        rows = x.reshape(len(x), -1, self.d, x.shape[-1] // self.e, self.e).transpose(0, 1, 3, 2, 4)
        return jnp.zeros((clusters, self.d, self.e), jnp.float32).at[self.codes].add(rows)

    def errors(self, x: jax.Array) -> jax.Array:
        """``gram @ x`` in each layer."""
        return jnp.matmul(self.gram, x, precision=HIGHEST)


def product(w: jax.Array, context: Context, indices: jax.Array, block: tuple[int, ...], unit: Any) -> Product:
    """A leaf as the descent sees it.

    Raises:
      ValueError: for blocks of axes that the layer does not contract, or statistics that do not fit.
    """
    layer, gram = matrices.of(w, context, "gram")
    order, e = _order(layer, block), block[-1] if block else 1
    shown = None if context.where is None else matrices.visible(layer, context)[:, order].astype(jnp.float32)
    matrix = unit.divide(layer.matrix())[:, order]
    gram = jax.vmap(lambda g: damped(g, _DAMPING))(gram)[:, order][:, :, order]
    codes = _small(layer, indices.shape).of(indices).matrix().astype(jnp.int32)
    return Product(matrix if shown is None else matrix * shown, gram, shown, codes, math.prod(block[:-1]), e)


def restored(w: jax.Array, context: Context, found: Product, like: jax.Array) -> jax.Array:
    """The codes of a leaf, laid out as its indices."""
    layer, _ = matrices.of(w, context, "gram")
    return _small(layer, like.shape).restore(found.codes.astype(jnp.float32)).astype(like.dtype)


def _small(layer: Contraction, shape: tuple[int, ...]) -> Contraction:
    return layer.of(jnp.zeros(shape, jnp.float32))


def _order(layer: Contraction, block: tuple[int, ...]) -> np.ndarray:
    """The contracted entries of each block in turn."""
    if not block:
        return np.arange(math.prod(layer.shape))
    shape, ndim = layer.w.shape, layer.w.ndim
    if layer.axes != tuple(range(layer.lead, ndim - 1)) or len(block) > ndim - layer.lead:
        raise ValueError(
            f"{layer.path}: KMeans(weigh='gram') found block={block} of shape {shape}, and the contracted axes are "
            f"{[i - ndim for i in layer.axes]}; leave the block out, or weigh"
        )
    if shape[-1] // layer.split % block[-1]:
        raise ValueError(f"{layer.path}: block={block} does not tile the outputs of a group; use {(*block[:-1], 1)}")
    return blocked(np.arange(math.prod(layer.shape)).reshape(layer.shape), block[:-1]).reshape(-1)


@jax.jit
def descended(words: jax.Array, leaves: Sequence[Product], price: Any) -> tuple[jax.Array, list[Product]]:
    """Words and codes with a smaller ``sum tr(dW^T gram dW) / e + price * bits``, from those that are there.

    ``e`` is the mean of that trace over weights, for weights of zero. Blocks of inputs take turns, all outputs at once:
    each gets the word that makes the error of the outputs least while all others stay (coordinate descent, as
    Behdin et al. 2023, arXiv:2309.01885, for integers). Then all words are fitted at once by conjugate gradients. No
    step raises the sum.

    Args:
      words: float32 (clusters, d, e).
      leaves: of one codebook.
      price: of a bit.
    """
    energy = sum(jnp.sum(p.w * p.errors(p.w)) for p in leaves) / max(sum(p.w.size for p in leaves), 1)
    worth = price * jnp.where(energy > 0, energy, 1.0)

    def round_(_: Any, state: tuple) -> tuple:
        words, codes = state
        held = [dataclasses.replace(p, codes=c) for p, c in zip(leaves, codes, strict=True)]
        for _ in range(_SWEEPS):
            offset = _offset(held, len(words), worth)
            held = [_swept(p, words, offset) for p in held]
        return _fitted(words, held), [p.codes for p in held]

    words, codes = lax.fori_loop(0, _ROUNDS, round_, (words, [p.codes for p in leaves]))
    return words, [dataclasses.replace(p, codes=c) for p, c in zip(leaves, codes, strict=True)]


def _offset(leaves: Sequence[Product], clusters: int, worth: jax.Array) -> jax.Array:
    counts = sum(jnp.zeros(clusters, jnp.float32).at[p.codes].add(1.0) for p in leaves)
    return jnp.where(worth > 0, worth * code_lengths(counts), 0.0)


def _swept(leaf: Product, words: jax.Array, offset: jax.Array) -> Product:
    """Every block of inputs in turn, in every layer."""
    shown = jnp.ones((len(leaf.w), 1, 1), jnp.float32) if leaf.shown is None else leaf.shown
    one = partial(_sweep, words=words, offset=offset, d=leaf.d, e=leaf.e, masked=leaf.shown is not None)
    return dataclasses.replace(leaf, codes=jax.vmap(one)(leaf.w, leaf.quantized(words), leaf.codes, leaf.gram, shown))


def _sweep(
    w: jax.Array, q: jax.Array, codes: jax.Array, gram: jax.Array, shown: jax.Array,
    *, words: jax.Array, offset: jax.Array, d: int, e: int, masked: bool,
) -> jax.Array:  # fmt: skip
    """The codes (k / d, n / e) of one layer."""
    rows = partial(lax.dynamic_slice_in_dim, slice_size=d)

    def block(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, codes = state  # left = w - q
        mine = rows(gram, i * d)
        own, old = lax.dynamic_slice_in_dim(mine, i * d, d, axis=1), rows(w, i * d) - rows(left, i * d)
        pull = jnp.matmul(mine, left, precision=HIGHEST) + jnp.matmul(own, old, precision=HIGHEST)
        pull = pull.reshape(d, -1, e)
        if masked:
            seen = rows(shown, i * d).reshape(d, 1, -1, e)
            tried = words.transpose(1, 0, 2)[:, :, None] * seen  # (d, clusters, n / e, e)
            costs = jnp.einsum("dkje,df,fkje->kj", tried, own, tried, precision=HIGHEST)
            costs = costs - 2 * jnp.einsum("dkje,dje->kj", tried, pull, precision=HIGHEST)
        else:
            costs = jnp.einsum("kde,df,kfe->k", words, own, words, precision=HIGHEST)[:, None]
            costs = costs - 2 * jnp.einsum("kde,dje->kj", words, pull, precision=HIGHEST)
        best = jnp.argmin(costs + offset[:, None], axis=0).astype(jnp.int32)
        new = words[best].transpose(1, 0, 2).reshape(d, -1)
        new = new * rows(shown, i * d) if masked else new
        left = lax.dynamic_update_slice_in_dim(left, rows(w, i * d) - new, i * d, 0)
        return left, codes.at[i].set(best)

    return lax.fori_loop(0, len(codes), block, (w - q, codes))[1]


def _fitted(words: jax.Array, leaves: Sequence[Product]) -> jax.Array:
    """The words that make the error of the outputs least for the codes as they are: a few steps towards them."""

    def normal(change: jax.Array) -> jax.Array:
        return sum((p.by_word(p.errors(p.quantized(change)), len(words)) for p in leaves), jnp.zeros_like(change))

    gradient = sum(p.by_word(p.errors(p.w - p.quantized(words)), len(words)) for p in leaves)
    return words + jax.scipy.sparse.linalg.cg(normal, gradient, tol=1e-4, maxiter=_STEPS)[0]
