"""Groups of axes that must be cut together: which layer feeds which."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import rules
from jcompress.core import PyTree
from jcompress.layers import listing
from jcompress.layers.counts import Count

Member = tuple[str, int]
Makers = str | tuple[str, ...]
Reader = str | Member


@dataclasses.dataclass(frozen=True)
class Group:
    """One dimension of a model: the axes of parameters that it lies on, so which layer feeds which.

    ``jc.trace.coupling`` reads them off a function. For one that cannot be read, write them by hand, or let
    :meth:`Groups.between` do it.

    Attributes:
      size: its length, the number of units.
      producers: ``(path, axis)`` pairs that write it: outputs of kernels, biases, norms and their statistics.
      consumers: the pairs over which a product or a convolution sums.
      maps: for each pair, the index inside the group of every position along the axis, or -1 where something else
        stands. An index occurs more than once where the axis is a product: heads times head dimension, or the
        places of an image times its channels. What is left out is ``0 ... size - 1``.
      reason: why it cannot be cut, or None.
      name: the axis that it was named after; a factor or a part of an axis has its number behind a dot.
      arguments: the axes of arguments that are cut with it, where ``free_args`` lets them: ``("1/key", 2)``.

    Example:
      >>> import jcompress as jc
      >>> group = jc.trace.Group(size=3, producers=(("a", 1),), consumers=(("b", 0),))
      >>> group.members, group.maps["b", 0].tolist()
      ((('a', 1), ('b', 0)), [0, 1, 2])
    """

    size: int
    producers: tuple[Member, ...] = ()
    consumers: tuple[Member, ...] = ()
    maps: Mapping[Member, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    reason: str | None = None
    name: str = ""
    arguments: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        whole = {m: np.asarray(self.maps[m]) if m in self.maps else np.arange(self.size) for m in self.members}
        object.__setattr__(self, "maps", whole)

    @property
    def members(self) -> tuple[Member, ...]:
        """All axes that must be cut together."""
        return (*self.producers, *self.consumers)

    @property
    def prunable(self) -> bool:
        """Whether it can be cut."""
        return self.reason is None

    def within(self, prefix: str) -> Group:
        """The group as a subtree sees it; members outside the subtree are left out."""
        start = prefix.rstrip("/") + "/"
        producers, consumers = (
            tuple((path.removeprefix(start), axis) for path, axis in members if path.startswith(start))
            for members in (self.producers, self.consumers)
        )
        maps = {(path.removeprefix(start), axis): x for (path, axis), x in self.maps.items() if path.startswith(start)}
        return dataclasses.replace(self, producers=producers, consumers=consumers, maps=maps)


class Groups(Mapping[str, Group]):
    """``{name: Group}``. It prints as a table that fits a screen; ``rows`` has all.

    Attributes:
      unread: primitives that could not be read, and how often each was met. All that they touch stays whole.
      multiply_adds: of the function, for any sizes of the groups; None for groups written by hand.
      bytes: of its parameters, for any sizes of the groups; None for groups written by hand.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((10, 3)))
      >>> groups["up[1]"].size, groups.multiply_adds({"up[1]": 4})
      (8, 200)
    """

    def __init__(
        self,
        groups: Mapping[str, Group] | Iterable[Group],
        unread: Mapping[str, int] | None = None,
        multiply_adds: Count | None = None,
        bytes: Count | None = None,
    ) -> None:
        if isinstance(groups, Mapping):
            groups = [dataclasses.replace(group, name=name) for name, group in groups.items()]
        self._groups = {group.name: group for group in groups}
        self.unread, self.multiply_adds, self.bytes = dict(unread or {}), multiply_adds, bytes

    @classmethod
    def between(cls, params: PyTree, pairs: Mapping[Makers, Sequence[Reader]], size: int | None = None) -> Groups:
        """Groups written by hand: what makes some activations, and the kernels that read them.

        Args:
          params: a pytree of arrays, or their shapes.
          pairs: for one path or several that make activations along their last axis (a kernel and its bias, the scale
            and the bias of a norm), the kernels that read them along axis -2, or along the axis of ``(path, axis)``.
          size: of the groups, where the axes hold them several times one after another: the head dimension, where the
            channels of heads are one axis. By default that of the first path's last axis.

        Returns:
          A group for each pair, named after what makes it first.

        Raises:
          ValueError: for a path that is not there, an axis that a parameter has not, lengths that do not fit, or a size
            that is not positive.

        Example:
          >>> import jax.numpy as jnp, jcompress as jc
          >>> params = {"scale": jnp.ones(4), "query": jnp.ones((4, 6)), "key": jnp.ones((4, 6))}
          >>> groups = jc.trace.Groups.between(params, {"scale": ["query", "key"]})
          >>> groups["scale[0]"].members
          (('scale', 0), ('query', 0), ('key', 0))
        """
        if size is not None and size < 1:
            raise ValueError(f"Groups.between: size={size} must be positive, or None for whole axes")
        shapes = {path: tuple(x.shape) if hasattr(x, "shape") else np.shape(x) for path, x in rules.paths(params)}
        return cls([_between(shapes, makers, readers, size) for makers, readers in pairs.items()])

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __or__(self, others: Mapping[str, Group]) -> Groups:
        """These and others, such as some by hand; of one name the other counts."""
        return Groups({**self._groups, **others}, self.unread, self.multiply_adds, self.bytes)

    @property
    def prunable(self) -> dict[str, Group]:
        """Those that can be cut."""
        return {name: g for name, g in self.items() if g.prunable}

    @property
    def rows(self) -> tuple[Group, ...]:
        """All groups, those that can be cut first."""
        return tuple(sorted(self.values(), key=lambda g: not g.prunable))

    def within(self, prefix: str) -> Groups:
        """The groups as a subtree sees them, such as the ``params`` of Flax variables, which an optimizer gets alone.

        Args:
          prefix: the path of the subtree. Members outside it are left out, and groups that have none in it.

        Example:
          >>> import jcompress as jc
          >>> group = jc.trace.Group(size=2, producers=(("params/scale", 0), ("batch_stats/mean", 0)))
          >>> jc.trace.Groups({"hidden": group}).within("params")["hidden"].members
          (('scale', 0),)
        """
        inside = [group.within(prefix) for group in self.values()]
        return Groups([group for group in inside if group.members], self.unread, self.multiply_adds, self.bytes)

    def __repr__(self) -> str:
        return f"Groups({len(self.prunable)} of {len(self)} can be cut)"

    def __str__(self) -> str:
        rows = [
            (g.name, g.size, (*g.members, *((f"args/{p}", a) for p, a in g.arguments)), g.reason) for g in self.rows
        ]
        return listing.table(rows, self.unread)

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


def _between(
    shapes: Mapping[str, tuple[int, ...]], makers: Makers, readers: Sequence[Reader], size: int | None
) -> Group:
    names = (makers,) if isinstance(makers, str) else makers
    producers = [_placed(shapes, (path, -1)) for path in names]
    asked = [(reader, -2) if isinstance(reader, str) else reader for reader in readers]
    consumers = [_placed(shapes, member) for member in asked]
    units, maps = size or shapes[names[0]][-1], {}
    given = [(path, -1) for path in names] + asked
    for (path, axis), (_, said) in zip((*producers, *consumers), given, strict=True):
        length = shapes[path][axis]
        if length % units or (size is None and length != units):
            wanted = (
                f"length {units}, that of the last axis of {names[0]}" if size is None else f"a multiple of {size=}"
            )
            raise ValueError(
                f"{path}: found axis {said} of shape {shapes[path]}, expected {wanted}; name the axis, as (path, axis)"
            )
        maps[path, axis] = np.arange(length) % units
    (path, axis), *_ = producers
    return Group(units, tuple(producers), tuple(consumers), maps, name=f"{path}[{axis}]")


def _placed(shapes: Mapping[str, tuple[int, ...]], member: Member) -> Member:
    path, axis = member
    if path not in shapes:
        raise ValueError(f"{path}: there is no such parameter; {closest(path, shapes)}")
    ndim = len(shapes[path])
    if not -ndim <= axis < ndim:
        raise ValueError(f"{path}: found shape {shapes[path]}, expected an axis {axis}; name the axis, as (path, axis)")
    return path, axis % ndim


def closest(name: str, known: Iterable[str]) -> str:
    """The known names most like this one, for an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return f"there are {len(known)}, such as {', '.join(map(repr, near))}" if known else "there are none"


def mask(params: PyTree, groups: Mapping[str, Group], keep: Mapping[str, Any]) -> PyTree:
    """Zero what is cut: every slice of every member whose index in the group is not kept.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``, or by hand.
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
        keep = (groups if isinstance(groups, Groups) else Groups(groups)).checked(keep)
    xp = jnp if traced else np
    cuts: dict[str, list[tuple[int, Any]]] = {}
    for name, kept in keep.items():
        for (path, axis), index in groups[name].maps.items():
            cuts.setdefault(path, []).append((axis, xp.where(index >= 0, xp.asarray(kept)[index], True)))
    leaves = rules.leaves(params)
    for path in cuts.keys() & leaves.keys():
        x = leaves[path]
        stays = functools.reduce(xp.logical_and, [_along(c, axis, jnp.ndim(x)) for axis, c in cuts[path]])
        leaves[path] = jnp.where(stays, x, jnp.zeros_like(x))
    return rules.rebuild(params, leaves)


def _along(x: Any, axis: int, ndim: int) -> Any:
    return x.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))
