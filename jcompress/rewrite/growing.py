"""Networks that grow or begin as a part of another: wider and deeper without a change, or with some of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import rules
from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group


def widen(
    params: PyTree, groups: Mapping[str, Group], sizes: Mapping[str, int], *, key: jax.Array | None = None
) -> PyTree:
    """Parameters of a wider network that computes the same (Net2WiderNet; Chen et al. 2016, arXiv:1511.05641).

    New units are copies of old ones, ``g(j) = j`` for the old and drawn for the rest. What writes a unit is copied with
    it; what reads it is divided by the number of its copies. So the function stays exactly what it was, wherever what
    lies between treats each unit alone (activations, biases, batch norm, pooling, dropout of none). It does not
    where units are summed without a kernel: under a norm over the axis, unless every unit is copied equally often, and
    in products of two activations (queries and keys). The model is built anew at the new width; functions that
    take sizes from their parameters are ready.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``, or by hand.
      sizes: the new size of each group that grows.
      key: of the units that are copied; without it they are copied in turn, each equally often where the new size is a
        multiple of the old.

    Returns:
      A pytree like ``params``, larger.

    Raises:
      ValueError: for a group that is unknown, cannot change, is read by no kernel or lies on an axis in an order that
        is not known, or a size below the present one.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [4.0]])}
      >>> groups = jc.trace.coupling(fn, params, jnp.ones((2, 1)))
      >>> wide = jc.rewrite.widen(params, groups, {"up[1]": 3})
      >>> wide["up"].tolist(), wide["down"].ravel().tolist()
      ([[1.0, 2.0, 1.0]], [1.5, 4.0, 1.5])
    """
    found, axes = units.leaves(params), dict[Any, Any]()
    for name, size in sizes.items():
        group = units.find(groups, name)
        if size < group.size or not group.consumers:
            reason = "no kernel reads it" if size >= group.size else f"it has {group.size} units"
            raise ValueError(f"{name}: widen: found size {size}, but {reason}")
        copied = np.arange(size) % group.size
        if key is not None:
            drawn = jax.random.randint(rules.key_of(key, name), (size - group.size,), 0, group.size)
            copied = np.concatenate([np.arange(group.size), np.asarray(drawn)])
        _grow(group, found, copied, axes)
    for (path, axis), (order, share) in axes.items():
        x = found[path]
        shaped = share.reshape((-1,) + (1,) * (x.ndim - axis - 1))
        found[path] = jnp.take((x * shaped).astype(x.dtype), order, axis=axis)
    return units.replace(params, found)


def _grow(group: Group, found: Mapping[str, Any], copied: np.ndarray, axes: dict[Any, Any]) -> None:
    """Say of each axis of a group which old positions the new ones are, and the share that each copy has."""
    copies = np.bincount(copied, minlength=group.size)
    for path, axis in group.members:
        index, length = group.maps[path, axis], found[path].shape[axis]
        order, share = axes.get((path, axis), (np.arange(length), np.ones(length, np.float32)))
        order = order[_positions(f"{path}[{axis}]", index[order], group.size, copied)]
        if (path, axis) in group.consumers:
            share = np.where(index >= 0, share / copies[np.maximum(index, 0)], share)
        axes[path, axis] = order, share.astype(np.float32)


def _positions(where: str, index: np.ndarray, size: int, copied: np.ndarray) -> np.ndarray:
    """Which positions of an axis the new ones are: each run over all units, each unit with its inner factor."""
    found: list[np.ndarray] = []
    at = 0
    while at < len(index):
        if index[at] < 0:
            found.append(np.array([at]))
            at += 1
            continue
        inner = int(np.argmax(np.append(index[at:] != index[at], True)))
        run = index[at : at + size * inner]
        if not np.array_equal(run, np.repeat(np.arange(size), inner)):
            raise ValueError(f"{where}: widen: units stand in an order that has no wider one; widen it by hand")
        found.append(at + (copied[:, None] * inner + np.arange(inner)).ravel())
        at += size * inner
    return np.concatenate(found)


def identity_layer(shape: Sequence[int], dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a layer that changes nothing (Net2DeeperNet; Chen et al. 2016, arXiv:1511.05641).

    The identity for a dense kernel (in, out), and for a convolution (window..., in, out) with ``SAME`` padding, an odd
    window and a stride of 1. Put it behind an activation that is idempotent, such as ReLU, with one more of these
    behind it; into a residual branch put a last kernel of zeros in place of it.

    Args:
      shape: of the kernel.
      dtype: of both.

    Returns:
      ``(kernel, bias)``.

    Raises:
      ValueError: if inputs and outputs differ in number, or a window is even.

    Example:
      >>> from jcompress import rewrite
      >>> rewrite.identity_layer((2, 2))[0].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    *window, inputs, outputs = shape
    if inputs != outputs or any(size % 2 == 0 for size in window):
        raise ValueError(f"identity_layer: found {tuple(shape)}, expected as many outputs as inputs and odd windows")
    middle = tuple(size // 2 for size in window)
    return jnp.zeros(shape, dtype).at[middle].set(jnp.eye(inputs, dtype=dtype)), jnp.zeros(outputs, dtype)


def take_layers(params: PyTree, match: str, keep: Sequence[int]) -> PyTree:
    r"""Some layers of a network as a network of fewer layers: a student that begins with its teacher's weights.

    As DistilBERT does (Sanh et al. 2019, arXiv:1910.01108), with ``keep`` from ``jc.distill.layer_map``. Layers that
    are kept are numbered anew from 0.

    Args:
      params: nested dictionaries, of arrays or anything else; layers are entries of one dictionary.
      match: a regular expression for the whole path of a layer, with its number as the only group:
        ``r"encoder/layer_(\d+)"``.
      keep: the numbers of the layers that stay, in their new order.

    Returns:
      Nested dictionaries of the same arrays.

    Raises:
      ValueError: if nothing matches, or a layer is not there.

    Example:
      >>> import jcompress as jc
      >>> params = {"embed": 1, "layer_0": 2, "layer_1": 3, "layer_2": 4, "layer_3": 5}
      >>> jc.rewrite.take_layers(params, r"layer_(\d+)", jc.distill.layer_map(2, 4))
      {'embed': 1, 'layer_0': 3, 'layer_1': 5}
    """
    pattern, seen = re.compile(match), set[int]()

    def taken(tree: Any, prefix: str) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        plain, layers = {}, {}
        for name, child in tree.items():
            found = pattern.fullmatch(f"{prefix}{name}")
            if found:
                layers[int(found[1])] = name, found.span(1), child
            else:
                plain[name] = taken(child, f"{prefix}{name}/")
        seen.update(layers)
        if layers and (missing := [i for i in keep if i not in layers]):
            raise ValueError(f"{prefix or 'params'}: take_layers: no layer {missing[0]}; there are {sorted(layers)}")
        for new, old in enumerate(keep if layers else ()):
            name, (start, end), child = layers[old]
            told = f"{prefix}{name}"
            renamed = f"{told[:start]}{new}{told[end:]}".removeprefix(prefix)
            plain[renamed if isinstance(name, str) else type(name)(renamed)] = child
        return plain

    found = taken(params, "")
    if not seen:
        raise ValueError(f"take_layers: {match!r} matches no layer; see the paths of the parameters")
    return found
