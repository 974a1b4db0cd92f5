"""Whole layers of the same structure: how alike they are, fusing the most alike, removing the least needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import PyTree

Similarity = Callable[[Any, Any], jax.Array]
Fusion = Literal["average", "freeze", "mix"]


def cosine(a: PyTree, b: PyTree) -> jax.Array:
    """The cosine of the angle between all numbers of two trees, in [-1, 1]; 0 if one tree is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> float(structured.cosine({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 4.0])})).__round__(4)
      0.6
    """
    pairs = list(zip(*(map(_flat, jax.tree.leaves(t, is_leaf=core.is_node)) for t in (a, b)), strict=True))
    product = sum(jnp.vdot(x, y, precision="highest") for x, y in pairs)
    squares = [sum(jnp.vdot(x, x, precision="highest") for x in side) for side in zip(*pairs, strict=True)]
    norm = jnp.sqrt(squares[0]) * jnp.sqrt(squares[1])
    return jnp.where(norm > 0, product / jnp.where(norm > 0, norm, 1), 0)


def _flat(x: Any) -> jax.Array:
    return jnp.ravel(core.dense(x)).astype(jnp.float32)


def layer_similarity(layers: PyTree, similarity: Similarity = cosine) -> jax.Array:
    """How alike each two layers are: (layers, layers).

    Args:
      layers: a list, of the parameters of each layer or of its activations; or one tree whose leaves have the layers
        on their first axis, as ``jax.lax.scan`` takes them.
      similarity: ``similarity(a, b)`` of two layers: :func:`cosine`, ``jc.measure.linear_cka`` of activations, or
        minus ``jc.measure.gaussian_wasserstein``, say.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> structured.layer_similarity({"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
      >>> hidden = [jnp.eye(3), 2 * jnp.eye(3)[::-1]]
      >>> structured.layer_similarity(hidden, jc.measure.linear_cka).round(3).tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    parts = _listed(layers)
    return jnp.stack([jnp.stack([similarity(a, b) for b in parts]) for a in parts])


def fuse_layers(
    layers: PyTree,
    count: int,
    mode: Fusion = "average",
    similarity: Similarity | jax.Array = cosine,
    *,
    adjacent: bool = True,
    key: jax.Array | None = None,
) -> tuple[PyTree, list[tuple[int, ...]]]:
    """Fuse the most alike pair of layers into one, ``count`` times (layer fusion; O'Neill et al. 2020, 2007.14917).

    The fused layer stands where the earlier one stood. ``"average"`` takes the mean, over all layers that were fused
    into it; ``"freeze"`` the earlier layer as it is; ``"mix"`` each number from one of the two by the toss of a coin.
    Retrain afterwards. Reads values, so it works outside ``jit`` only; shapes change.

    Args:
      layers: a list of parameters of layers, or one tree with the layers on the first axis of its leaves.
      count: how many layers to lose, less than there are.
      mode: ``"average"``, ``"freeze"`` or ``"mix"``.
      similarity: of two layers' parameters, computed anew for fused layers; or a matrix (layers, layers), such as
        :func:`layer_similarity` gives for activations, in which a fused layer has the mean of what its parts have.
      adjacent: whether only neighbours may be fused.
      key: for ``"mix"``.

    Returns:
      ``(shorter, sources)``: the layers in the form in which they came, and for each the layers that it came from.

    Raises:
      ValueError: for a count that leaves no layer, layers of unlike structure, an unknown mode, or a missing key.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> layers = {"w": jnp.array([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])}
      >>> shorter, sources = structured.fuse_layers(layers, 1)
      >>> shorter["w"].tolist(), sources
      ([[1.0, 0.10000000149011612], [0.0, 1.0]], [(0, 1), (2,)])
    """
    parts = _listed(layers)
    _check(parts, count, mode, key)
    sources: list[tuple[int, ...]] = [(i,) for i in range(len(parts))]
    alike = _pairwise(similarity, len(parts))
    for step in range(count):
        pairs = [(i, j) for j in range(len(parts)) for i in range(j) if not adjacent or j == i + 1]
        i, j = max(pairs, key=lambda pair: alike(parts, sources, *pair))
        share = len(sources[i]) / len(sources[i] + sources[j])
        parts[i] = _fused(parts[i], parts[j], share, mode, None if key is None else jax.random.fold_in(key, step))
        sources[i] = tuple(sorted(sources[i] + sources[j]))
        del parts[j], sources[j]
    return _like(layers, parts), sources


def _pairwise(similarity: Similarity | jax.Array, n: int) -> Callable[..., float]:
    """The similarity of two of the layers there are, each pair computed once."""
    known: dict[tuple, float] = {}
    if not callable(similarity) and np.shape(similarity) != (n, n):
        raise ValueError(f"fuse_layers: found similarities of shape {np.shape(similarity)}, expected {(n, n)}")

    def alike(parts: list[PyTree], sources: list[tuple[int, ...]], i: int, j: int) -> float:
        pair = (sources[i], sources[j])
        if pair not in known:
            found = similarity(parts[i], parts[j]) if callable(similarity) else np.mean(similarity[np.ix_(*pair)])
            known[pair] = float(found)
        return known[pair]

    return alike


def _check(parts: list[PyTree], count: int, mode: str, key: Any) -> None:
    if mode not in ("average", "freeze", "mix"):
        raise ValueError(f"fuse_layers: mode={mode!r} is unknown; use 'average', 'freeze' or 'mix'")
    if mode == "mix" and key is None:
        raise ValueError("fuse_layers: mode='mix' tosses coins; pass key=jax.random.key(...)")
    _check_count("fuse_layers", parts, count)
    for i, part in enumerate(parts):
        if _form(part) != _form(parts[0]):
            raise ValueError(
                f"fuse_layers: layer {i} has the form {_form(part)}, layer 0 {_form(parts[0])}; give layers of one form"
            )


def _check_count(name: str, parts: list[PyTree], count: int) -> None:
    if not 0 <= count < len(parts):
        raise ValueError(f"{name}: count={count} of {len(parts)} layers; it must be from 0 to {len(parts) - 1}")


def _form(part: PyTree) -> Any:
    return jax.tree.structure(part), [jnp.shape(x) for x in jax.tree.leaves(part)]


def _fused(a: PyTree, b: PyTree, share: float, mode: Fusion, key: jax.Array | None) -> PyTree:
    """One layer from two, of which the first counts for ``share``."""
    if mode == "freeze":
        return a
    if mode == "average":
        return jax.tree.map(lambda x, y: (share * x + (1 - share) * y).astype(x.dtype), a, b)
    assert key is not None
    leaves, treedef = jax.tree.flatten(a)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
    return jax.tree.map(lambda x, y, k: jnp.where(jax.random.bernoulli(k, 0.5, x.shape), x, y), a, b, keys)


def block_influence(hidden: Sequence[jax.Array] | jax.Array) -> jax.Array:
    """How much each layer of a residual stream turns it: ``1 - mean cosine(input, output)`` (Men et al. 2024).

    The mean is over all positions. 0 for a layer that leaves the stream as it is; those of the least influence are
    removed first (ShortGPT, arXiv:2403.03853). Works under ``jit``.

    Args:
      hidden: the stream before the first layer and after each: layers + 1 arrays (..., features).

    Returns:
      (layers,), in [0, 2].

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> stream = jnp.array([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 3.0]]])
      >>> structured.block_influence(stream).tolist()
      [0.0, 1.0]
    """
    rows = [jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1]) for x in hidden]
    return jnp.stack([1 - jnp.mean(jax.vmap(cosine)(a, b)) for a, b in itertools.pairwise(rows)])


def remove_layers(layers: PyTree, scores: jax.Array | Sequence[float], count: int) -> tuple[PyTree, list[int]]:
    """Leave out the layers of the lowest scores; of equal ones the later go first.

    Reads the scores, so it works outside ``jit`` only; shapes change.

    Args:
      layers: a list of parameters of layers, or one tree with the layers on the first axis of its leaves.
      scores: (layers,), such as :func:`block_influence` gives.
      count: how many to remove, less than there are.

    Returns:
      ``(shorter, kept)``: the layers in the form in which they came, and the indices of those that stay.

    Raises:
      ValueError: for a count that leaves no layer, or another number of scores.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> structured.remove_layers(["a", "b", "c"], [0.5, 0.1, 0.9], 1)
      (['a', 'c'], [0, 2])
    """
    parts, order = _listed(layers), np.asarray(scores, np.float64)
    _check_count("remove_layers", parts, count)
    if order.shape != (len(parts),):
        raise ValueError(f"remove_layers: found scores of shape {order.shape}, expected ({len(parts)},)")
    kept = sorted(np.argsort(-order, kind="stable")[: len(parts) - count].tolist())
    return _like(layers, [parts[i] for i in kept]), kept


def _listed(layers: PyTree) -> list[PyTree]:
    """The layers one by one."""
    if isinstance(layers, (list, tuple)):
        return list(layers)
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(layers)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"layers: found first axes {sorted(sizes)} among the leaves, expected one number of layers; pass a list of "
            "layers if they are not stacked"
        )
    return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(next(iter(sizes))[0])]


def _like(layers: PyTree, parts: list[PyTree]) -> PyTree:
    """Layers in the form of others: a list, or stacked."""
    if isinstance(layers, (list, tuple)):
        return type(layers)(parts)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
