"""Ranges of channels made equal between the layers that make them and those that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import rules
from jcompress.core import PyTree
from jcompress.layers.groups import Group
from jcompress.rewrite import links


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


def equalize(params: PyTree, groups: Mapping[str, Group], rounds: int = 20) -> PyTree:
    """Move scale between layers until their channels have equal ranges (Nagel et al. 2019, arXiv:1906.04721).

    With ``r_i`` the largest magnitude by which channel ``i`` is made and ``q_i`` that by which it is used, what makes
    it is divided by ``s_i = sqrt(r_i / q_i)`` and what uses it multiplied, so that both become ``sqrt(r_i q_i)``. The
    function stays the same where all that lies between satisfies ``f(s x) = s f(x)`` for positive ``s``: ReLU, leaky
    ReLU, pooling, but not GELU, and no normalization: fold it first. One scale for an array then wastes fewer levels.
    Channels that are all zero, on either side, stay as they are.

    Args:
      params: dense parameters.
      groups: of ``jc.trace.coupling``, those of which that is true, or by hand: ``jc.trace.Groups.between(params,
        {("first/kernel", "first/bias"): ["second/kernel"]})``. A group may be made by several kernels and used by
        several others.
      rounds: sweeps over all of them; layers in a row come to agree as they are repeated.

    Returns:
      The parameters, scaled.

    Raises:
      ValueError: if a path is missing, or a group lacks kernels on one side or holds more vectors than a bias for each
        of its kernels.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.array([[8.0, 1.0]]), "down": jnp.array([[2.0], [4.0]])}
      >>> params = jc.rewrite.equalize(params, jc.trace.Groups.between(params, {"up": ["down"]}))
      >>> params["up"].tolist(), params["down"].tolist()
      ([[4.0, 2.0]], [[4.0], [2.0]])
    """
    leaves = rules.leaves(params)
    ties = [_tie(name, group, leaves) for name, group in groups.items()]
    touched = {m.path for tie in ties for part in tie[1:] for m in part}

    def sweep(_: Any, current: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for size, producers, consumers in ties:
            current = _balanced(current, size, producers, consumers)
        return current

    wide = {path: leaves[path].astype(jnp.float32) for path in touched}
    scaled = jax.lax.fori_loop(0, rounds, sweep, wide)
    leaves |= {path: x.astype(leaves[path].dtype) for path, x in scaled.items()}
    return rules.rebuild(params, leaves)


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


def _tie(name: str, group: Group, leaves: Mapping[str, Any]) -> _Tie:
    """The size of a dimension, and the members that make it and use it."""
    links.check(leaves, name, tuple(path for path, _ in group.members))
    producers, consumers = (
        [_Member(path, axis, jnp.asarray(group.maps[path, axis])) for path, axis in members]
        for members in (group.producers, group.consumers)
    )
    kernels = [m for m in producers if jnp.ndim(leaves[m.path]) > 1]
    if not kernels or not consumers or len(producers) > 2 * len(kernels):
        told = ", ".join(m.path for m in producers)
        raise ValueError(
            f"{name}: made by {told or 'nothing'} and used by {len(consumers)} parameters; equalize needs kernels on "
            "both sides and no vectors but their biases: fold normalization into the kernels first, or leave "
            "the group out"
        )
    return group.size, producers, consumers
