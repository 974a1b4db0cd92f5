"""Ranges of channels made equal between the layers that make them and those that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.trace import Group


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two kernels, the outputs of one the inputs of the other, with a positively homogeneous function between.

    Attributes:
      first: path of the kernel whose last axis are the outputs.
      second: path of the kernel whose axis -2 are the inputs.
      bias: path of the first one's bias, or None.
    """

    first: str
    second: str
    bias: str | None = None


@dataclasses.dataclass(frozen=True)
class _Member:
    """An axis of a parameter, and the channel at each place along it, or -1."""

    path: str
    axis: int
    channels: jax.Array

    def factor(self, scale: jax.Array, w: jax.Array) -> jax.Array:
        """One number for each place, in a shape that broadcasts to the parameter's."""
        along = jnp.where(self.channels >= 0, scale[self.channels], 1.0)
        return jnp.expand_dims(along, [i for i in range(w.ndim) if i != self.axis % w.ndim])

    def largest(self, w: jax.Array, size: int) -> jax.Array:
        """The largest magnitude that each channel holds."""
        along = jnp.abs(w).max([i for i in range(w.ndim) if i != self.axis % w.ndim])
        known = jnp.where(self.channels >= 0, along, 0)
        return jnp.zeros(size, w.dtype).at[self.channels].max(known)


def equalize(params: PyTree, between: Iterable[Pair | Group], rounds: int = 20) -> PyTree:
    """Move scale between layers until their channels have equal ranges (Nagel et al. 2019, arXiv:1906.04721).

    With ``r_i`` the largest magnitude by which channel ``i`` is made and ``q_i`` that by which it is used, what makes
    it is divided by ``s_i = sqrt(r_i / q_i)`` and what uses it multiplied, so that both become ``sqrt(r_i q_i)``. The
    function stays the same where all that lies between satisfies ``f(s x) = s f(x)`` for positive ``s``: ReLU, leaky
    ReLU, pooling, but not GELU, and no normalization: fold it first. One scale for an array then wastes fewer levels.
    Channels that are all zero, on either side, stay as they are.

    Args:
      params: dense parameters.
      between: pairs of kernels, or groups of ``jc.trace.coupling``; a group may be made by several kernels and used by
        several others.
      rounds: sweeps over all of them; layers in a row come to agree as they are repeated.

    Returns:
      The parameters, scaled.

    Raises:
      ValueError: if a path is missing, two kernels of a pair do not fit, or a group holds more vectors than a bias for
        each of its kernels.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.array([[8.0, 1.0]]), "down": jnp.array([[2.0], [4.0]])}
      >>> params = jc.rewrite.equalize(params, [jc.rewrite.Pair("up", "down")])
      >>> params["up"].tolist(), params["down"].tolist()
      ([[4.0, 2.0]], [[4.0], [2.0]])
    """
    found = rules.paths(params)
    leaves = dict(found)
    ties = [_tie(x, leaves) for x in between]
    touched = {m.path for tie in ties for part in tie[1:] for m in part}

    def sweep(_: Any, current: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for size, producers, consumers in ties:
            current = _balanced(current, size, producers, consumers)
        return current

    wide = {path: leaves[path].astype(jnp.float32) for path in touched}
    scaled = jax.lax.fori_loop(0, rounds, sweep, wide)
    leaves |= {path: x.astype(leaves[path].dtype) for path, x in scaled.items()}
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=core.is_node), [leaves[path] for path, _ in found])


_Tie = tuple[int, list[_Member], list[_Member]]


def _balanced(
    leaves: dict[str, jax.Array], size: int, producers: list[_Member], consumers: list[_Member]
) -> dict[str, jax.Array]:
    made, used = (
        jnp.stack([m.largest(leaves[m.path], size) for m in members if leaves[m.path].ndim > 1]).max(0)
        for members in (producers, consumers)
    )
    scale = jnp.where((made > 0) & (used > 0), jnp.sqrt(made / jnp.where(used > 0, used, 1)), 1)
    leaves = dict(leaves)
    for m in producers:
        leaves[m.path] = leaves[m.path] / m.factor(scale, leaves[m.path])
    for m in consumers:
        leaves[m.path] = leaves[m.path] * m.factor(scale, leaves[m.path])
    return leaves


def _tie(between: Pair | Group, leaves: Mapping[str, Any]) -> _Tie:
    """The size of a dimension, and the members that make it and use it."""
    if isinstance(between, Pair):
        return _tie_of_pair(between, leaves)
    producers, consumers = (
        [_Member(path, axis, jnp.asarray(between.maps[path, axis])) for path, axis in members]
        for members in (between.producers, between.consumers)
    )
    kernels = [m for m in producers if jnp.ndim(leaves[m.path]) > 1]
    if not kernels or not consumers or len(producers) > 2 * len(kernels):
        told = ", ".join(m.path for m in producers)
        raise ValueError(
            f"{between.name}: made by {told or 'nothing'} and used by {len(consumers)} parameters; equalize needs "
            "kernels on both sides and no vectors but their biases: fold normalization into the kernels first"
        )
    return between.size, producers, consumers


def _tie_of_pair(pair: Pair, leaves: Mapping[str, Any]) -> _Tie:
    for path in (pair.first, pair.second, pair.bias):
        if path is not None and path not in leaves:
            raise ValueError(f"{path}: there is no such parameter; the paths are {', '.join(leaves)}")
    size, inputs = leaves[pair.first].shape[-1], leaves[pair.second].shape[-2]
    if size != inputs:
        raise ValueError(f"{pair.second}: axis -2 is {inputs} long, {pair.first} has {size} outputs; they must agree")
    channels = jnp.arange(size)
    biases = [] if pair.bias is None else [_Member(pair.bias, -1, channels)]
    return size, [_Member(pair.first, -1, channels), *biases], [_Member(pair.second, -2, channels)]
