"""The parts of an optimizer's state that hold one number for each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import rules
from jcompress.core import PyTree


def _places(params: PyTree) -> dict[tuple, tuple[str, tuple[int, ...]]]:
    """Path and shape of every parameter by its key path."""
    keyed = jax.tree_util.tree_flatten_with_path(params)[0]
    return {keys: (path, jnp.shape(x)) for (keys, x), (path, _) in zip(keyed, rules.paths(params), strict=True)}


def _owner(keys: tuple, shape: tuple[int, ...], places: Mapping[tuple, tuple[str, tuple[int, ...]]]) -> str | None:
    """The path of the parameter that a leaf of the state belongs to.

    A copy of the parameters' tree inside the state ends in the same keys, also where ``masked`` or ``partition`` left
    some of its leaves out. The longest match wins.
    """
    for start in range(len(keys) + 1):
        path, expected = places.get(keys[start:], (None, None))
        if path is not None and expected == shape:
            return path
    return None


def reset(init: Callable[[PyTree], PyTree], state: PyTree, params: PyTree, active: Mapping[str, jax.Array]) -> PyTree:
    """The state with the entries of weights that are not active as ``init`` would give them for weights of zero.

    Args:
      init: the optimizer's ``init``.
      state: the optimizer's state.
      params: the parameters, for their structure and shapes.
      active: ``{path: mask}``; other parameters keep all their state.

    Factored or flattened statistics (Adafactor's rows and columns) belong to no single weight and stay.
    """
    places = _places(params)
    fresh = jax.tree.leaves(init(jax.tree.map(jnp.zeros_like, params)))
    keyed, treedef = jax.tree_util.tree_flatten_with_path(state)

    def one(keys: tuple, x: Any, start: Any) -> Any:
        path = _owner(keys, jnp.shape(x), places)
        return x if path is None or path not in active else jnp.where(active[path], x, start)

    return jax.tree.unflatten(treedef, [one(keys, x, start) for (keys, x), start in zip(keyed, fresh, strict=True)])
