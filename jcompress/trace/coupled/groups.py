"""Which axes of which parameters must be cut together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jcompress import rules
from jcompress.core import PyTree
from jcompress.layers.groups import Group, Groups, Member
from jcompress.trace import primitives
from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled import sizes, slices
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import Frame, read_leaves, read_states
from jcompress.trace.coupled.states import Hold, all_hold


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A function whose dimensions have been read.

    Attributes:
      program: the traced function.
      frame: its equations with their dimensions.
      groups: what can be cut.
      leaves: the dimension of each group.
      arguments: the dimensions of the arguments that may be cut.
    """

    program: walk.Program
    frame: Frame
    groups: Groups
    leaves: Mapping[str, Dim]
    arguments: Mapping[str, Dims]

    @property
    def params(self) -> list[Dims]:
        """The dimensions of the parameters."""
        return self.frame.ins[: len(self.program.paths)]


@dataclasses.dataclass(frozen=True)
class Free:
    """Which outputs and arguments may be cut: regular expressions for their paths."""

    outputs: str | None = None
    arguments: str | None = None


def read(fn: Callable[..., Any], params: PyTree, *args: Any, free: Free = Free()) -> Coupled:
    """Trace ``fn`` and tie its dimensions; see :func:`coupling`."""
    program = walk.program(fn, params, *args)
    n, build = len(program.paths), Build(lambda eqn: primitives.row(eqn).rule, primitives.UNREAD.rule)
    ins = [terms.fresh(v.aval.shape) for v in program.closed.jaxpr.invars]
    arguments = _pinned(jax.tree.unflatten(program.in_tree, map(_Held, ins))[1:], free.arguments, "argument")
    frame = build.frame(program.closed, ins, trained=[i < n for i in range(len(ins))])
    _pinned(jax.tree.unflatten(program.out_tree, map(_Held, frame.outs)), free.outputs, "output")
    build.settle(ins[:n])
    seen = read_leaves(frame).union(leaf for value in frame.outs for d in value for leaf in terms.leaves(d))
    for value in ins[:n]:
        for d in value:
            terms.pin(terms.repeated(d), "it occurs twice in one axis")
            terms.pin([x for x in terms.leaves(d) if x not in seen], "nothing reads it, with arguments of these shapes")
    read_states(frame, [all_hold(d, Hold.ZERO) for d in ins[:n]] + [all_hold(d, Hold.VARIED) for d in ins[n:]])
    contracted = {part for d in build.contracted for part in terms.own_parts(d)}
    groups, leaves = _name(dict(zip(program.paths, ins, strict=False)), contracted, arguments)
    names = {leaf: name for name, leaf in leaves.items()}
    shapes = [v.aval for v in program.closed.jaxpr.invars[:n]]
    counts = (
        sizes.multiply_adds(frame, names, slices.asked(frame, program.closed, names)),
        sizes.parameter_bytes(shapes, ins[:n], names),
    )
    return Coupled(program, frame, Groups(groups, build.unread, *counts), leaves, arguments)


def _pinned(tree: PyTree, free: str | None, what: str) -> dict[str, Dims]:
    """Pin what must stay of arguments or outputs; gives the rest."""
    found = {}
    for path, held in rules.paths(tree, is_leaf=lambda x: isinstance(x, _Held)):
        if free is not None and re.fullmatch(free, path):
            found[path] = held.dims
        else:
            terms.pin(held.dims, f"it is an axis of an {what}")
    return found


@dataclasses.dataclass(frozen=True)
class _Held:
    """Dimensions as one leaf of a tree."""

    dims: Dims


def _name(
    params: Mapping[str, Dims], contracted: set[Dim], arguments: Mapping[str, Dims]
) -> tuple[list[Group], dict[str, Dim]]:
    """The leaves that lie on parameters as groups, named after the first kernel that writes them."""
    where: dict[Dim, list[Member]] = {}
    consumers = set()
    for path, dims in params.items():
        for axis, d in enumerate(dims):
            if not terms.own_parts(d).isdisjoint(contracted):
                consumers.add((path, axis))
            for leaf in dict.fromkeys(terms.leaves(d)):
                if leaf.size > 1:
                    where.setdefault(leaf, []).append((path, axis))
    groups, leaves = [], {}
    for leaf, members in where.items():
        path, axis = min(members, key=lambda m: (m in consumers, -len(params[m[0]])))
        beside = list(dict.fromkeys(x for x in terms.leaves(params[path][axis]) if x.size > 1))
        name = f"{path}[{axis}]" + (f".{beside.index(leaf)}" if len(beside) > 1 else "")
        maps = {(p, a): terms.index_of(params[p][a], leaf) for p, a in members}
        cut = tuple(m for m in members if m in consumers)
        made = tuple(m for m in members if m not in consumers)
        given = tuple((p, a) for p, dims in arguments.items() for a, d in enumerate(dims) if leaf in terms.leaves(d))
        groups.append(Group(leaf.size, made, cut, maps, leaf.pinned, name, given))
        leaves[name] = leaf
    return groups, leaves


def coupling(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    free_outputs: str | None = None,
    free_args: str | None = None,
) -> Groups:
    """The dimensions of a model: which axes of which parameters must be cut together.

    The function is traced once, nothing is computed. What ties axes is read off its equations: residual sums,
    concatenation and split, flattening after a convolution, heads and head dimension, grouped and depthwise
    convolution, gates, embeddings and tied heads, norms and their statistics, loops. Axes of arguments and outputs,
    spatial axes, looked-up rows and loop lengths stay, and so does what nothing reads for arguments of these shapes,
    such as positions beyond their length.

    Args:
      fn: ``fn(params, *args)``: any JAX function, such as ``lambda p, x: model.apply({"params": p}, x)``.
      params: a pytree of arrays, or their shapes. Batch statistics may be among them.
      *args: example arguments, or their shapes. Lengths of 1 hide ties, so take a batch of at least 2.
      free_outputs: a regular expression for the paths of outputs that may be cut, such as returned batch
        statistics: ``"1/.*"``.
      free_args: the same for arguments, such as a cache of keys and values: ``"1"`` is the second of ``args``, and
        ``"1/.*"`` all that is in it. What they hold where they are cut does not count.

    Returns:
      A mapping ``{name: Group}``; print it.

    Raises:
      ValueError: if a parameter is a compressed node.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
      >>> def mlp(p, x):
      ...     return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
      >>> print(jc.trace.coupling(mlp, params, jnp.ones((5, 3))))
      group  size  alike  cut together
      up[1]     8      1  bias[0], up[1], down[0]
      1 stays: it is an axis of an output
      1 stays: it is an axis of an argument
    """
    return read(fn, params, *args, free=Free(free_outputs, free_args)).groups
