"""Columns of kernels that two networks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.formats import Codebook
from jcompress.layers import matrices
from jcompress.layers.matrices import Contraction
from jcompress.numeric.blocks import blocked
from jcompress.share.tying import owners


def zipped(
    params: PyTree, pairs: Mapping[str, str], share: float = 0.5, *, stats: Mapping[str, Any] | None = None
) -> PyTree:
    r"""Let the kernels of two networks share columns: multi-task zipping (He et al. 2018, arXiv:1805.09791).

    Of each pair of kernels so many outputs are joined two by two, those whose joining costs the outputs of both layers
    least, and a joint column is stored once, counted once and trained once, with the gradient of both tasks. With
    ``A``, ``B`` the Gram matrices of the inputs of both, columns ``a`` and ``b`` become ``(A + B)^-1 (A a + B b)``,
    which costs ``(a - b)^T A (A + B)^-1 B (a - b)``; without statistics, their mean. The paper's greedy pairs are the
    best assignment here, its Hessians of a layer the Gram matrices.

    Units of networks that were trained apart stand in any order: bring one into the order of the other first
    (:func:`jcompress.rewrite.match_units`), or the inputs of all layers but the first have nothing in common. Train
    what is shared on both tasks afterwards.

    Works on concrete arrays, outside ``jit``.

    Args:
      params: both networks in one tree, ``{"first": ..., "second": ...}``.
      pairs: ``{path of the second: path of the first}``; paths may be patterns, as in :func:`jcompress.tie`.
      share: of the outputs of each kernel, from 0 to 1.
      stats: from ``jc.calibrate`` of a function of both, with the statistic ``gram``; None for plain means.

    Returns:
      The tree, a :class:`jcompress.formats.Codebook` of columns for each kernel of a pair. The first's holds the
      columns of both, and the second's refers to them.

    Raises:
      ValueError: for a share out of range, a path that is not there or in two pairs, kernels of different shapes or
        dtypes, one that is no matrix or convolution or not finite, or statistics that are missing. The message names
        the paths.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> first, second = (jax.random.normal(key, (8, 6)) for key in jax.random.split(jax.random.key(0)))
      >>> params = {"first": {"w": first}, "second": {"w": second.at[:, 0].set(first[:, 3])}}
      >>> tree = jc.share.zipped(params, {"second/w": "first/w"}, share=0.5)
      >>> tree["first"]["w"].codebook.shape, int(tree["second"]["w"].indices[0, 0])
      ((9, 8), 3)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"zipped: share={share} must be from 0 to 1: the part of the outputs that is shared")
    leaves = rules.leaves(params)
    found: dict[str, Any] = {}
    for second, first in owners(leaves, pairs, "zip").items():
        if taken := [path for path in (first, second) if path in found]:
            raise ValueError(f"{taken[0]}: is in two pairs, found in {second} with {first}; zip two kernels at a time")
        found[first], found[second] = _joined(first, second, leaves, share, stats)
    return rules.rebuild(params, core.settled(found))


def _joined(
    first: str, second: str, leaves: Mapping[str, Any], share: float, stats: Mapping[str, Any] | None
) -> tuple[Codebook, Codebook]:
    """The nodes of one pair."""
    a, b = (_layer(path, leaves[path], stats) for path in (first, second))
    if a.w.shape != b.w.shape or a.w.dtype != b.w.dtype or a.axes != b.axes:
        raise ValueError(
            f"{second}: found {b.w.dtype}{list(b.w.shape)}, and {first} is {a.w.dtype}{list(a.w.shape)}; zip kernels "
            "of layers that are alike"
        )
    columns = [np.asarray(layer.matrix()[0], np.float64) for layer in (a, b)]
    n = columns[0].shape[1]
    mine, theirs, joint = _pairs(columns[0], columns[1], _gram(a), _gram(b), round(share * n))
    for column, places in zip(columns, (mine, theirs), strict=True):
        column[:, places] = joint
    block = tuple(size if i in a.axes else 1 for i, size in enumerate(a.w.shape))
    dense = [layer.restore(jnp.asarray(x[None], jnp.float32)) for layer, x in zip((a, b), columns, strict=True)]
    words = [blocked(x, block).reshape(n, -1) for x in dense]
    alone = np.setdiff1d(np.arange(n), theirs)
    places = np.empty(n, np.int64)
    places[theirs], places[alone] = mine, n + np.arange(len(alone))
    clusters = n + len(alone)
    book = core.Common(jnp.concatenate([words[0], words[1][alone]]), (first,))
    shape = tuple(1 if i in a.axes else size for i, size in enumerate(a.w.shape))
    dtype = np.uint8 if clusters <= 256 else np.uint16
    nodes = [
        Codebook(jnp.asarray(index.reshape(shape).astype(dtype)), book, clusters, a.w.ndim, block)
        for index in (np.arange(n), places)
    ]
    return nodes[0], nodes[1]


def _layer(path: str, w: Any, stats: Mapping[str, Any] | None) -> Contraction:
    """A kernel as a matrix of one layer; without statistics its last axis is that of outputs."""
    if core.is_node(w) or w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{path}: found {w!r}, expected the kernel of a dense layer or a convolution, an array")
    if not core.is_concrete(w):
        raise ValueError(f"{path}: zipped reads the values, so it works outside jit only")
    if not np.isfinite(np.asarray(w, np.float32)).all():
        raise ValueError(f"{path}: found NaN or infinity, expected finite weights; mend the kernel, or leave it out")
    if stats is None:
        return Contraction(path, w, tuple(range(w.ndim - 1)), 0, 1, None)
    layer = matrices.contraction(path, w, stats.get(path), "gram")
    if layer.lead or layer.split > 1:
        raise ValueError(f"{path}: found stacked layers or groups of a convolution; take them apart, or leave them out")
    return layer


def _gram(layer: Contraction) -> np.ndarray | None:
    """The Gram matrix, a hundredth of its mean diagonal added to it, in units of its mean; None without statistics."""
    if layer.stat is None:
        return None
    gram = np.asarray(layer.stat.gram, np.float64).reshape(len(layer.matrix()[0]), -1)
    mean = np.trace(gram) / len(gram) or 1.0
    return gram / mean + 0.01 * np.eye(len(gram))


def _pairs(
    a: np.ndarray, b: np.ndarray, gram: np.ndarray | None, other: np.ndarray | None, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """So many columns of each, those that are joined, and what they become, (k, count)."""
    if gram is None or other is None:
        parallel = np.eye(len(a)) / 2
    else:
        parallel = gram @ scipy.linalg.solve(gram + other, other, assume_a="pos")
    left = a.T @ parallel
    costs = np.einsum("nk,kn->n", left, a)[:, None] - 2 * left @ b + np.einsum("kn,kn->n", b, parallel @ b)
    rows, columns = scipy.optimize.linear_sum_assignment(costs)
    least = np.sort(np.argsort(costs[rows, columns], kind="stable")[:count])
    mine, theirs = rows[least], columns[least]
    if gram is None or other is None:
        return mine, theirs, (a[:, mine] + b[:, theirs]) / 2
    joint = scipy.linalg.solve(gram + other, gram @ a[:, mine] + other @ b[:, theirs], assume_a="pos")
    return mine, theirs, joint
