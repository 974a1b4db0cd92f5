"""What a model of the zoo is, and how its leaves are drawn."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc

PyTree = Any
VARIANCE = re.compile(r"(^|[/._])(var|variance|var_ema/average)$")


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of other people's, with its parameters.

    Attributes:
      fn: ``fn(params, *args)``, pure and traceable.
      params: every leaf a float array and random.
      args: the other arguments.
    """

    fn: Callable[..., Any]
    params: PyTree
    args: tuple


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model by name, built when asked for.

    Attributes:
      name: of the model.
      package: that holds its code, as the package index calls it.
      build: imports the package and makes the model.
    """

    name: str
    package: str
    build: Callable[[], Model]

    def missing(self) -> str | None:
        """Why it cannot be built here, or None."""
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        return None


def model(fn: Callable[..., Any], tree: PyTree, *args: Any, seed: int = 0) -> Model:
    """A model whose parameters are the float leaves of a tree; what else the tree holds stays as it is."""
    params, rest = _floats(tree), tree

    def of_floats(params: PyTree, *args: Any) -> Any:
        return fn(jax.tree.map(lambda p, x: x if p is None else p, params, rest, is_leaf=lambda x: x is None), *args)

    return Model(of_floats, drawn(params, seed), args)


def _floats(tree: PyTree) -> PyTree:
    def is_float(x: Any) -> bool:
        return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)

    return jax.tree.map(lambda x: x if is_float(x) else None, tree)


def drawn(params: PyTree, seed: int = 0) -> PyTree:
    """Random values for the leaves that a library sets to a constant: no bias is zero, no scale is one."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    names = [path for path, _ in jc.paths(params)]
    return structure.unflatten([jnp.asarray(_drawn(*x, rng), x[1].dtype) for x in zip(names, leaves, strict=True)])


def _drawn(path: str, leaf: Any, rng: np.random.Generator) -> Any:
    value = np.asarray(leaf, np.float32)
    if VARIANCE.search(path):
        return rng.uniform(0.5, 1.5, value.shape)
    constant = value.size > 0 and value.min() == value.max()
    return value + 0.3 * rng.standard_normal(value.shape) if constant else value


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """Inputs of that shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def integers(high: int, *shape: int, seed: int = 1) -> jax.Array:
    """Tokens, or classes, below ``high``."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)
