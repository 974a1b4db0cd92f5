"""What makes some activations and which kernels read them, from groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jcompress import core
from jcompress.layers.groups import Group, closest


class Link(NamedTuple):
    """The parameters that make some activations, and the kernels that read them."""

    name: str
    makers: tuple[str, ...]
    readers: tuple[str, ...]


def links(found: Mapping[str, Any], groups: Mapping[str, Group], who: str) -> list[Link]:
    """The links of all groups that something writes and a kernel reads, each once.

    Two groups of the same parameters, as heads and head dimension are, are one link: channels are their pairs.

    Raises:
      ValueError: for a path that is not there, a node, or if no group has both sides.
    """
    made: dict[tuple, Link] = {}
    for name, group in groups.items():
        makers, readers = (
            tuple(dict.fromkeys(path for path, _ in side)) for side in (group.producers, group.consumers)
        )
        check(found, name, (*makers, *readers))
        if makers and readers:
            made.setdefault((makers, readers), Link(name, makers, readers))
    if not made:
        raise ValueError(
            f"{who}: none of {len(groups)} groups is both written and read by parameters; pass those of "
            "jc.trace.coupling, or jc.trace.Groups.between(params, {what makes: [what reads]})"
        )
    return list(made.values())


def check(found: Mapping[str, Any], name: str, paths: tuple[str, ...]) -> None:
    """Raise for a path of a group that is not there, or for a node."""
    for path in paths:
        if path not in found:
            raise ValueError(
                f"{path}: the group {name!r} names it, but there is no such parameter; {closest(path, found)}"
            )
        if core.is_node(found[path]):
            kind = type(found[path]).__name__
            raise ValueError(f"{path}: found a {kind} node, expected an array; fold first, then compress")
