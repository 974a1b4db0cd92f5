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
from jcompress.numeric import meshes


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
    return jax.tree.map(meshes.struct, tree)


def shape_of(leaf: Any) -> Any:
    """The shape and dtype that a leaf stands for; one that stands for another as it is."""
    if isinstance(leaf, core.Reference):
        return leaf
    return jax.eval_shape(core.dense, leaf) if core.is_node(leaf) else shapes(leaf)


def leaves(params: PyTree) -> list[tuple[str, Any]]:
    """Parameters with their paths, but for those that stand for others: what is done to the owner is done to them."""
    return [(path, x) for path, x in rules.paths(params) if not isinstance(x, core.Reference)]


def program(fn: Callable[..., Any], params: PyTree, *args: Any) -> Program:
    """Trace ``fn(params, *args)``; arrays may be given by their shapes and dtypes.

    A parameter that stands for another one is that one, as far as the function is concerned.

    Raises:
      ValueError: if a parameter is a compressed node.
    """
    found = leaves(params)
    for path, leaf in found:
        if core.is_node(leaf):
            raise ValueError(f"{path}: found a {type(leaf).__name__} node where an array was expected; materialize it")
    is_tied = len(found) < len(rules.paths(params))
    call = (lambda params, *args: fn(core.untie(params), *args)) if is_tied else fn
    closed, out = jax.make_jaxpr(call, return_shape=True)(params, *args)
    in_tree, out_tree = jax.tree.structure((params, *args)), jax.tree.structure(out)
    return Program(closed, tuple(path for path, _ in found), in_tree, out_tree)


def equations(jaxpr: jax_core.Jaxpr) -> list[jax_core.JaxprEqn]:
    """Those that an output or an effect needs, in order; a compiler runs no others."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jax_core.Literal)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jax_core.Literal))
            found.append(eqn)
    return found[::-1]


def aval(x: Any) -> Any:
    """The shape and dtype of a variable or a literal."""
    return x.aval


def bind(eqn: jax_core.JaxprEqn, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Apply an equation's primitive to values, with some of its parameters changed."""
    given = {**eqn.params, **changed}
    freed = {name: None for name, x in given.items() if meshes.is_freed(x)}
    if "dst_sharding" in freed:
        return list(values)
    found = eqn.primitive.get_bind_params({**given, **freed})
    # Before jax 0.8 the functions that a primitive calls came apart from its parameters.
    functions, params = found if isinstance(found, tuple) else ((), found)
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def take(x: Any, index: Any, axis: int) -> jax.Array:
    """The positions ``index`` along an axis. They are sharded as before where their number allows it."""
    if not meshes.is_explicit(x):
        return meshes.sharded_like(jnp.take(x, index, axis=axis), x)
    whole = [None if i == axis else names for i, names in enumerate(meshes.spec_of(x))]
    place = (slice(None),) * axis + (jnp.asarray(index),)
    sharding = jax.sharding.NamedSharding(meshes.mesh_of(x), jax.sharding.PartitionSpec(*whole))
    return meshes.sharded_like(jnp.asarray(x).at[place].get(out_sharding=sharding), x)
