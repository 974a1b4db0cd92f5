"""The order of units in which the blocks of kernels are easiest to quantize."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group
from jcompress.share.kmeans import KMeans


def permute(
    params: PyTree,
    groups: Mapping[str, Group],
    block: int = 8,
    *,
    fn: Callable[[PyTree], Any] | None = None,
    words: int | None = None,
    swaps: int = 2_000,
    key: jax.Array | None = None,
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Reorder units so that inputs that stand in one block of a kernel vary together (Martinez et al. 2021).

    Words of ``block`` inputs, ``jc.share.KMeans(block=(block, 1))``, have an error that grows with the determinant of
    the covariance of the blocks. Which inputs stand together is free: the order of units is changed in what writes them
    and in all that reads them, residual groups included, and the function stays what it is. For each group the sum over
    its kernels of ``det(cov) ** (1 / block)`` is lowered, relative to the energy of each: the squared error of words
    for Gaussian blocks is in proportion to it (Gersho & Gray 1992, section 10.2). The paper sums logarithms; in a
    residual group one kernel whose blocks are all but singular then outweighs the rest. The best of three orders begins
    (as it is, by energy, those that are alike together), then two units at random change places where that helps.

    The determinant is what the error would be if blocks were Gaussian. Kernels with channels that are nearly dead are
    not: pass ``words``, and an order is taken only where codebooks then have less error, in sum over the kernels.

    A function that tells units apart by their place, by a constant of one number a unit (statistics of a norm that it
    closes over, a rotary embedding), would be another one afterwards. Pass ``fn``, and groups that it tells apart are
    left as they are.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``; all prunable ones are treated whose size the block divides.
      block: inputs of a word.
      fn: of parameters alone, ``lambda p: apply(p, x)``: what it gives must stay within 1e-3 of its largest number.
      words: of the codebooks by which an order is judged, at most an eighth of a kernel's blocks; None to take all.
      swaps: exchanges that are tried, a group.
      key: for the exchanges; ``jax.random.key(0)`` by default.

    Returns:
      ``(new_params, orders)``: parameters of the same shapes, and ``{name: (size,)}``, for each place the unit that was
      taken for it.

    Raises:
      ValueError: for a block or a number of words that is not above 1, or a parameter of a group that is not there.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> rows = jax.random.normal(jax.random.key(0), (2, 64))
      >>> params = {"a": jnp.arange(12.0).reshape(3, 4), "b": rows[jnp.array([0, 1, 0, 1])]}
      >>> groups = jc.trace.coupling(fn, params, jnp.ones((1, 3)))
      >>> new, orders = jc.rewrite.permute(params, groups, block=2)
      >>> x = jnp.ones(3)
      >>> bool(jnp.allclose(new["b"][0], new["b"][1])), bool(jnp.allclose(fn(new, x), fn(params, x)))
      (True, True)

    Reference: "Permute, Quantize, and Fine-tune", arXiv:2010.15703.
    """
    if block < 2:
        raise ValueError(f"permute: block={block} must be at least 2; a word of one input has no order")
    if words is not None and words < 2:
        raise ValueError(f"permute: words={words} must be at least 2, or None to take every order")
    found, orders = units.leaves(params), {}
    outputs = None if fn is None else jax.jit(fn)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key)).ravel())
    for name in units.prunable(groups):
        group = groups[name]
        if not group.size or group.size % block or not units.movable(group):
            continue
        places = {m: units.positions(group.maps[m], group.size) for m in group.consumers}
        readers = [m for m in group.consumers if _in_blocks(places[m], len(group.maps[m]), block)]
        kernels = [_Part.of(found[path], axis, places[path, axis]) for path, axis in readers]
        if not kernels:
            continue
        order = _searched([_Moments.of(x) for x in kernels], group.size, block, swaps, rng)
        if words is not None and not _fits_better(kernels, order, block, words):
            continue
        changed = units.reordered(found, group, order)
        moved = units.replace(params, found | changed)
        if outputs is None or _alike_outputs(outputs(params), outputs(moved)):
            orders[name], found = order, found | changed
    return units.replace(params, found), orders


def _alike_outputs(before: PyTree, after: PyTree) -> bool:
    """Whether outputs are the same but for rounding."""

    def near(a: Any, b: Any) -> bool:
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        return bool(np.all(np.abs(a - b) <= 1e-3 * np.abs(a).max(initial=0.0) + 1e-12))

    return all(jax.tree.leaves(jax.tree.map(near, before, after)))


def _fits_better(kernels: Sequence[_Part], order: np.ndarray, block: int, words: int) -> bool:
    """Whether codebooks of the kernels have less relative error in sum in this order."""
    change = 0.0
    for kernel in kernels:
        x = jnp.asarray(kernel.whole, jnp.float32)
        method = KMeans(clusters=max(min(words, x.size // block // 8), 1), block=(block, 1))
        moved = x.at[kernel.places].set(x[kernel.places[order]])
        before, after = (float(jnp.square(method(y).materialize() - y).sum()) for y in (x, moved))
        change += (after - before) / max(float(jnp.square(x).sum()), 1e-30)
    return change < 0


def _in_blocks(places: np.ndarray, length: int, block: int) -> bool:
    """Whether every unit stands at one place of an axis, (size, 1), and the units of a word at those of a block."""
    if places.shape[1] != 1 or length % block:
        return False
    words = places.reshape(-1, block)
    return bool((words[:, 0] % block == 0).all() and (np.diff(words, axis=1) == 1).all())


class _Part(NamedTuple):
    """What a kernel reads of a group.

    Attributes:
      whole: the kernel, a row for each place of the axis.
      places: of the units, (size,).
    """

    whole: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, kernel: jax.Array, axis: int, places: np.ndarray) -> _Part:
        whole = np.moveaxis(np.asarray(kernel, np.float64), axis, 0)
        whole = whole.reshape(len(whole), -1)
        return cls(whole / (np.abs(whole).max(initial=0.0) or 1.0), places[:, 0])


class _Moments:
    """What the covariance of blocks of units is made of, in units of their energy, and their part of the kernel's."""

    def __init__(self, products: np.ndarray, sums: np.ndarray, count: int, weight: float) -> None:
        self.products, self.sums, self.count, self.weight = products, sums, count, weight

    @classmethod
    def of(cls, part: _Part) -> _Moments:
        rows = part.whole[part.places]
        energy = np.square(rows).sum()
        rows = rows * (math.sqrt(rows.size / energy) if energy else 1.0)
        return cls(rows @ rows.T, rows.sum(1), rows.shape[1], energy / (np.square(part.whole).sum() or 1.0))

    def totals(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of products (block, block), and of entries (block,), over blocks (blocks, block) of units."""
        return self.products[table[:, :, None], table[:, None, :]].sum(0), self.sums[table].sum(0)

    def size(self, products: np.ndarray, sums: np.ndarray, blocks: int) -> float:
        """The geometric mean of the variances of the covariance, a little added to it, which may be singular."""
        mean = sums / (blocks * self.count)
        cov = products / (blocks * self.count) - np.outer(mean, mean)
        cov = cov + np.eye(len(cov)) * (1e-6 * np.trace(cov) / len(cov) + 1e-30)
        return self.weight * math.exp(float(np.linalg.slogdet(cov)[1]) / len(cov))


def _searched(kernels: Sequence[_Moments], size: int, block: int, swaps: int, rng: np.random.Generator) -> np.ndarray:
    """The order of units with the least sum that was found."""
    energy = sum(np.diagonal(k.products) / max(np.trace(k.products), 1e-30) for k in kernels)
    starts = [np.arange(size), _by_energy(energy, block), _alike(kernels, block)]
    tables = [order.reshape(-1, block) for order in starts]
    return _exchanged(kernels, min(tables, key=lambda table: _cost(kernels, table)), swaps, rng).reshape(-1)


def _cost(kernels: Sequence[_Moments], table: np.ndarray) -> float:
    return sum(k.size(*k.totals(table), len(table)) for k in kernels)


def _by_energy(energy: np.ndarray, block: int) -> np.ndarray:
    """Units of most energy at the first place of all blocks, then at the second: no product of variances is less."""
    return np.argsort(-energy, kind="stable").reshape(block, -1).T.reshape(-1)


def _alike(kernels: Sequence[_Moments], block: int) -> np.ndarray:
    """Blocks of units that are most alike: each begins with the unit of most energy that is left."""
    alike = sum(k.products / max(np.trace(k.products), 1e-30) for k in kernels)
    norms = np.sqrt(np.maximum(np.diagonal(alike), 1e-30))
    cosine, left, found = alike / norms[:, None] / norms, np.ones(len(norms), bool), []
    while left.any():
        first = int(np.argmax(np.where(left, norms, -1)))
        near = np.argsort(-np.where(left, cosine[first], -np.inf), kind="stable")[:block]
        found.append(near)
        left[near] = False
    return np.concatenate(found)


def _exchanged(kernels: Sequence[_Moments], table: np.ndarray, swaps: int, rng: np.random.Generator) -> np.ndarray:
    """Two units of different blocks change places, as often as it helps."""
    blocks, block = table.shape
    if blocks < 2:
        return table
    totals = [k.totals(table) for k in kernels]
    best = sum(k.size(*t, blocks) for k, t in zip(kernels, totals, strict=True))
    for first, second, i, j in zip(
        rng.integers(blocks, size=swaps), rng.integers(1, blocks, size=swaps), *rng.integers(block, size=(2, swaps)),
        strict=True,
    ):  # fmt: skip
        pair = np.array([first, (first + second) % blocks])
        changed = table[pair].copy()
        changed[0, i], changed[1, j] = table[pair[1], j], table[pair[0], i]
        tried = []
        for k, (products, sums) in zip(kernels, totals, strict=True):
            (less, fewer), (more, others) = k.totals(table[pair]), k.totals(changed)
            tried.append((products - less + more, sums - fewer + others))
        cost = sum(k.size(*t, blocks) for k, t in zip(kernels, tried, strict=True))
        if cost < best:
            best, totals, table = cost, tried, table.copy()
            table[pair] = changed
    return table
