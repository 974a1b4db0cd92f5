"""Whole layers of the same structure: the most alike fused, the least needed removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.measure.layers import Similarity, cosine, listed

Fusion = Literal["average", "freeze", "mix"]


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
      >>> from jcompress import rewrite
      >>> layers = {"w": jnp.array([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])}
      >>> shorter, sources = rewrite.fuse_layers(layers, 1)
      >>> shorter["w"].tolist(), sources
      ([[1.0, 0.10000000149011612], [0.0, 1.0]], [(0, 1), (2,)])
    """
    parts = listed(layers)
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
    return jax.tree.map(lambda x, y, k: jnp.where(jax.random.bernoulli(k, jnp.float32(0.5), x.shape), x, y), a, b, keys)


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
      >>> from jcompress import rewrite
      >>> rewrite.remove_layers(["a", "b", "c"], [0.5, 0.1, 0.9], 1)
      (['a', 'c'], [0, 2])
    """
    parts, order = listed(layers), np.asarray(scores, np.float64)
    _check_count("remove_layers", parts, count)
    if order.shape != (len(parts),):
        raise ValueError(f"remove_layers: found scores of shape {order.shape}, expected ({len(parts)},)")
    kept = sorted(np.argsort(-order, kind="stable")[: len(parts) - count].tolist())
    return _like(layers, [parts[i] for i in kept]), kept


def _like(layers: PyTree, parts: list[PyTree]) -> PyTree:
    """Layers in the form of others: a list, or stacked."""
    if isinstance(layers, (list, tuple)):
        return type(layers)(parts)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
