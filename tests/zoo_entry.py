"""What an entry of the zoo is, how its leaves are drawn, and the formulas that count parameters."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Built:
    """A model and what is known about it.

    Attributes:
      fn: ``fn(params, *args)``, pure and traceable, at any batch size.
      params: every leaf random.
      args: ``args(batch, key)`` gives the inputs.
      widths: each axis that can be cut, by name: the path of one leaf and the axis of it where the width shows,
        alone or as a factor or part of the axis.
      sizes: the original size of each named width.
      count: ``count(**sizes)`` gives the number of scalars in the parameters.
      free_outputs: pattern of the output paths that may shrink too, such as returned batch statistics.
      reverse: whether ``jax.grad`` runs; ``while_loop`` has no reverse derivative, only a forward one.
      optional: widths whose cut slices take a common value that is not zero, which depends on the data, and why.
        A reading of the function may follow that value, or pin the width and give the reason.
    """

    fn: Callable
    params: PyTree
    args: Callable[[int, jax.Array], tuple]
    widths: dict[str, tuple[str, int]]
    sizes: dict[str, int]
    count: Callable[..., int]
    free_outputs: str | None = None
    reverse: bool = True
    optional: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model by name, built when asked for."""

    name: str
    build: Callable[[], Built]


def randomize(params: PyTree, key: jax.Array) -> PyTree:
    """Draws every leaf, also from shapes alone, so that activations stay O(1): no bias is zero, no scale is one."""
    leaves, structure = jax.tree.flatten(params)
    names, rng = [path for path, _ in jc.paths(params)], generator(key)
    return structure.unflatten([jnp.asarray(_draw(*x, rng), x[1].dtype) for x in zip(names, leaves, strict=True)])


def generator(key):
    """NumPy's, which compiles nothing."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _draw(path, leaf, rng):
    assert jnp.issubdtype(leaf.dtype, jnp.floating), f"{path}: {leaf.dtype}"
    shape, name = leaf.shape, path.split("/")[-1]
    if name == "var":
        return rng.uniform(0.5, 1.5, shape)
    normal = rng.standard_normal(shape)
    if name == "scale":
        return 1 + 0.3 * normal
    if name != "kernel":
        return 0.5 * normal
    heads_in = any(part in path.split("/")[-2] for part in ("query", "key", "value"))
    fan_in = shape[-3] if heads_in and len(shape) > 2 else math.prod(shape[:-1])
    return normal * (2 / fan_in) ** 0.5


def images(height, width, channels):
    return features(height, width, channels)


def features(*shape):
    return lambda batch, key: (jnp.asarray(generator(key).standard_normal((batch, *shape)), jnp.float32),)


def tokens(length, vocabulary):
    return lambda batch, key: (jnp.asarray(generator(key).integers(0, vocabulary, (batch, length)), jnp.int32),)


def dense_count(inputs, outputs):
    return inputs * outputs + outputs


def conv_count(window, inputs, outputs):
    """With a bias; ``window`` is the number of taps, ``inputs`` those of one group."""
    return window * inputs * outputs + outputs


def norm_conv_count(window, inputs, outputs):
    """A convolution without a bias, then batch norm: scale, bias, mean and variance."""
    return window * inputs * outputs + 4 * outputs
