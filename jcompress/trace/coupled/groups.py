"""Which axes of which parameters must be cut together."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import rules
from jcompress.core import PyTree
from jcompress.trace.core import walk
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import Build, Frame, Hold, Rule, all_hold, read_states
from jcompress.trace.primitives import RULES

Member = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Group:
    """One dimension of a model: the axes of parameters that it lies on.

    Attributes:
      name: the axis that it was named after; a factor or a part of an axis has its number behind a dot.
      size: its length.
      members: the ``(path, axis)`` pairs that must be cut together.
      maps: for each member, the index inside the group of every position along the axis, or -1 where something else
        stands. An index occurs more than once where the axis is a product: heads times head dimension, or the
        places of an image times its channels.
      consumers: the members over which a product or a convolution sums.
      reason: why it cannot be cut, or None.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    maps: Mapping[Member, np.ndarray] = dataclasses.field(repr=False)
    consumers: tuple[Member, ...] = dataclasses.field(default=(), repr=False)
    reason: str | None = None

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that are not consumers: kernels that write it, biases, scales, statistics."""
        return tuple(m for m in self.members if m not in self.consumers)

    @property
    def prunable(self) -> bool:
        """Whether it can be cut."""
        return self.reason is None


class Groups(Mapping):
    """``{name: Group}``, printable; those that cannot be cut are listed with the reason.

    Attributes:
      unread: primitives that could not be read, and how often each was met. All that they touch stays whole.
    """

    def __init__(self, groups: Sequence[Group], unread: Mapping[str, int] | None = None) -> None:
        self._groups = {g.name: g for g in groups}
        self.unread = dict(unread or {})

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def prunable(self) -> dict[str, Group]:
        """Those that can be cut."""
        return {name: g for name, g in self.items() if g.prunable}

    def __repr__(self) -> str:
        return f"Groups({len(self.prunable)} of {len(self)} can be cut)"

    def __str__(self) -> str:
        rows = [("group", "size", "cut together, or why it stays")]
        for name, g in sorted(self.items(), key=lambda item: not item[1].prunable):
            rows.append((name, str(g.size), g.reason or ", ".join(f"{path}[{axis}]" for path, axis in g.members)))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]
        lines += [f"{name}: met {n} times and not read; what it touches stays whole" for name, n in self.unread.items()]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def checked(self, keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """``keep`` as boolean arrays.

        Raises:
          ValueError: for an unknown name, a length that is not the group's, a group that cannot be cut, or one of
            which nothing would stay.
        """
        return {name: self._checked(name, value) for name, value in keep.items()}

    def _hint(self, name: str) -> str:
        """Where to look instead."""
        found = [g for g in self.values() if name in {f"{path}[{axis}]" for path, axis in g.members}]
        if found:
            return "on that axis lies\n" + "\n".join(map(_told, found))
        return f"those that can be cut are {', '.join(self.prunable)}; print the groups to see their members"

    def _checked(self, name: str, value: Any) -> np.ndarray:
        if name not in self:
            raise ValueError(f"{name}: there is no such group; {self._hint(name)}")
        group, index = self[name], np.asarray(value)
        together = f"it is\n{_told(group)}"
        if index.dtype != np.bool_ or index.shape != (group.size,):
            raise ValueError(
                f"{name}: found {index.dtype} of shape {index.shape}, expected bool of shape ({group.size},); "
                f"{together}"
            )
        if not index.all() and group.reason is not None:
            raise ValueError(f"{name}: cannot be cut, because {group.reason}; {together}")
        if not index.any():
            raise ValueError(f"{name}: nothing would stay; keep at least one index; {together}")
        return index


def _told(group: Group) -> str:
    members = "\n".join(f"  {path} axis {axis}" for path, axis in group.members)
    return f"{group.name}, of length {group.size}; these must change together:\n{members}"


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A function whose dimensions have been read.

    Attributes:
      program: the traced function.
      frame: its equations with their dimensions.
      groups: what can be cut.
      leaves: the dimension of each group.
    """

    program: walk.Program
    frame: Frame
    groups: Groups
    leaves: Mapping[str, Dim]

    @property
    def params(self) -> list[Dims]:
        """The dimensions of the parameters."""
        return self.frame.ins[: len(self.program.paths)]


def read(fn: Callable[..., Any], params: PyTree, *args: Any, free_outputs: str | None = None) -> Coupled:
    """Trace ``fn`` and tie its dimensions; see :func:`coupling`."""
    program = walk.program(fn, params, *args)
    n, build = len(program.paths), Build(RULES, Rule())
    ins = [terms.fresh(v.aval.shape) for v in program.closed.jaxpr.invars]
    for value in ins[n:]:
        terms.pin(value, "it is an axis of an argument")
    frame = build.frame(program.closed, ins)
    _pin_outputs(program, frame, free_outputs)
    for value in ins[:n]:
        for d in value:
            terms.pin(terms.repeated(d), "it occurs twice in one axis")
    read_states(frame, [all_hold(d, Hold.ZERO) for d in ins[:n]] + [all_hold(d, Hold.VARIED) for d in ins[n:]])
    contracted = {part for d in build.contracted for part in terms.own_parts(d)}
    groups, leaves = _name(dict(zip(program.paths, ins, strict=False)), contracted)
    return Coupled(program, frame, Groups(groups, build.unread), leaves)


def _pin_outputs(program: walk.Program, frame: Frame, free: str | None) -> None:
    tree = jax.tree.unflatten(program.out_tree, [_Held(d) for d in frame.outs])
    for path, held in rules.paths(tree, is_leaf=lambda x: isinstance(x, _Held)):
        if free is None or not re.fullmatch(free, path):
            terms.pin(held.dims, "it is an axis of an output")


@dataclasses.dataclass(frozen=True)
class _Held:
    """Dimensions as one leaf of a tree."""

    dims: Dims


def _name(params: Mapping[str, Dims], contracted: set[Dim]) -> tuple[list[Group], dict[str, Dim]]:
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
        groups.append(Group(name, leaf.size, tuple(members), maps, cut, leaf.pinned))
        leaves[name] = leaf
    return groups, leaves


def coupling(fn: Callable[..., Any], params: PyTree, *args: Any, free_outputs: str | None = None) -> Groups:
    """The dimensions of a model: which axes of which parameters must be cut together.

    The function is traced once, nothing is computed. What ties axes is read off its equations: residual sums,
    concatenation and split, flattening after a convolution, heads and head dimension, grouped and depthwise
    convolution, gates, embeddings and tied heads, norms and their statistics, loops. Axes of arguments and outputs,
    spatial axes, looked-up rows and loop lengths stay.

    Args:
      fn: ``fn(params, *args)``: any JAX function, such as ``lambda p, x: model.apply({"params": p}, x)``.
      params: a pytree of arrays, or their shapes. Batch statistics may be among them.
      *args: example arguments, or their shapes. Lengths of 1 hide ties, so take a batch of at least 2.
      free_outputs: a regular expression for the paths of outputs that may be cut, such as returned batch
        statistics: ``"1/.*"``.

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
      group    size  cut together, or why it stays
      up[1]       8  bias[0], down[0], up[1]
      down[1]     2  it is an axis of an output
      up[0]       3  it is an axis of an argument
    """
    return read(fn, params, *args, free_outputs=free_outputs).groups


def mask(params: PyTree, groups: Groups, keep: Mapping[str, Any]) -> PyTree:
    """Zero what is cut: every slice of every member whose index in the group is not kept.

    Args:
      params: a pytree of arrays.
      groups: from :func:`coupling`.
      keep: ``{name: bool (size,)}``, True keeps; groups that are not named stay whole. May be traced.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: as :meth:`Groups.checked`; under ``jit`` only for unknown names.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((1, 3)), "down": jnp.ones((3, 1))}
      >>> groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 1)))
      >>> jc.trace.mask(params, groups, {"up[1]": jnp.array([True, False, True])})["up"].tolist()
      [[1.0, 0.0, 1.0]]
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in keep.values())
    if not traced or any(name not in groups for name in keep):
        keep = groups.checked(keep)
    xp = jnp if traced else np
    cuts: dict[str, list[tuple[int, Any]]] = {}
    for name, kept in keep.items():
        for (path, axis), index in groups[name].maps.items():
            cuts.setdefault(path, []).append((axis, xp.where(index >= 0, xp.asarray(kept)[index], True)))
    leaves = []
    for path, x in rules.paths(params):
        stays = functools.reduce(xp.logical_and, [_along(c, axis, jnp.ndim(x)) for axis, c in cuts.get(path, ())], True)
        leaves.append(x if stays is True else jnp.where(stays, x, jnp.zeros_like(x)))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _along(x: Any, axis: int, ndim: int) -> Any:
    return x.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))
