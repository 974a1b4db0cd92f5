"""How alike the layers of a network are, what each does to the stream, and how deep all of them are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree

Similarity = Callable[[Any, Any], jax.Array]


def cosine(a: PyTree, b: PyTree) -> jax.Array:
    """The cosine of the angle between all numbers of two trees, in [-1, 1]; 0 if one tree is zero.

    Args:
      a: a pytree of arrays or nodes.
      b: one of the same structure.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> float(measure.cosine({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 4.0])})).__round__(4)
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

    Returns:
      What ``similarity`` gives for each two layers, (layers, layers).

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> measure.layer_similarity({"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
      >>> hidden = [jnp.eye(3), 2 * jnp.eye(3)[::-1]]
      >>> measure.layer_similarity(hidden, measure.linear_cka).round(3).tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    parts = listed(layers)
    return jnp.stack([jnp.stack([similarity(a, b) for b in parts]) for a in parts])


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
      >>> from jcompress import measure
      >>> stream = jnp.array([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 3.0]]])
      >>> measure.block_influence(stream).tolist()
      [0.0, 1.0]
    """
    rows = [jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1]) for x in hidden]
    return jnp.stack([1 - jnp.mean(jax.vmap(cosine)(a, b)) for a, b in itertools.pairwise(rows)])


def average_path_length(structure: Any, tolerance: float = 0.0) -> jax.Array:
    """The mean number of nonlinearities on a path through a network (Mehmeti-Goepel & Disselhoff 2022, 2211.17180).

    An activation counts the fraction of its channels that are not linear, ``mean 1[|1 - slope| > tolerance]``; what
    stands in series is added; where branches join, each counts the same, whatever the number of paths inside it. A
    plain stack of ReLU layers gives its depth, a linear network 0. Works under ``jit`` on the slopes.

    Args:
      structure: an array of slopes (a number for all channels); a list of structures in series; or a tuple of branches
        that start at one place and are added at another, each a structure, ``[]`` for a skip connection.
      tolerance: how far from 1 a slope may be and count as linear.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for a tuple of no branches, or an array of no slopes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> relu, half = 0.0, jnp.array([0.0, 1.0])
      >>> block = ([relu, half], [])
      >>> float(measure.average_path_length([relu, block, block]))
      2.5
    """
    if isinstance(structure, tuple):
        if not structure:
            raise ValueError("average_path_length: found a tuple of no branches; write a skip connection as []")
        return jnp.mean(jnp.stack([average_path_length(branch, tolerance) for branch in structure]))
    if isinstance(structure, list):
        return sum((average_path_length(part, tolerance) for part in structure), jnp.zeros((), jnp.float32))
    slopes = jnp.asarray(structure, jnp.float32)
    if slopes.size == 0:
        raise ValueError("average_path_length: found an activation without slopes; leave it out")
    return jnp.mean(jnp.abs(1 - slopes) > tolerance, dtype=jnp.float32)


def listed(layers: PyTree) -> list[PyTree]:
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
