"""What every reading of a function shares: its jaxpr with the parameters named, and its equations applied anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from jcompress import core, rules
from jcompress.core import PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
      closed: its jaxpr; the parameters are the first inputs, the arguments follow.
      paths: the path of each parameter.
      in_tree: the structure of ``(params, *args)``.
      out_tree: the structure of the outputs.
    """

    closed: jax_core.ClosedJaxpr
    paths: tuple[str, ...]
    in_tree: Any
    out_tree: Any


def shapes(tree: PyTree) -> PyTree:
    """The tree with the shape and dtype of each array in its place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def program(fn: Callable[..., Any], params: PyTree, *args: Any) -> Program:
    """Trace ``fn(params, *args)``; arrays may be given by their shapes and dtypes.

    Raises:
      ValueError: if a parameter is a compressed node.
    """
    leaves = rules.paths(params)
    for path, leaf in leaves:
        if core.is_node(leaf):
            raise ValueError(f"{path}: found a {type(leaf).__name__} node where an array was expected; materialize it")
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    in_tree, out_tree = jax.tree.structure((params, *args)), jax.tree.structure(out)
    return Program(closed, tuple(path for path, _ in leaves), in_tree, out_tree)


def aval(x: Any) -> Any:
    """The shape and dtype of a variable or a literal."""
    return x.aval


def bind(eqn: jax_core.JaxprEqn, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Apply an equation's primitive to values, with some of its parameters changed."""
    found = eqn.primitive.get_bind_params({**eqn.params, **changed})
    # Before jax 0.8 the functions that a primitive calls came apart from its parameters.
    functions, params = found if isinstance(found, tuple) else ((), found)
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def take(x: Any, index: Any, axis: int) -> jax.Array:
    """The positions ``index`` along an axis. On a mesh with explicit axes the result is whole along it."""
    sharding: Any = getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    spec = tuple(getattr(sharding, "spec", ()))
    if all(names is None for names in spec):
        return jnp.take(x, index, axis=axis)
    whole = jax.sharding.PartitionSpec(*(None if i == axis else names for i, names in enumerate(spec)))
    place = (slice(None),) * axis + (jnp.asarray(index),)
    return jnp.asarray(x).at[place].get(out_sharding=jax.sharding.NamedSharding(sharding.mesh, whole))
