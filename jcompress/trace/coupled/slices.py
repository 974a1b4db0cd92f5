"""Which slices that are cut a function still computes at smaller shapes, because they count as one for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from jcompress.numeric import meshes
from jcompress.trace import primitives
from jcompress.trace.core.bodies import Bodies
from jcompress.trace.core.kinds import Contraction
from jcompress.trace.coupled.dims import Dim
from jcompress.trace.coupled.frames import NOWHERE, At, Cut, Frame, Site, Value, run
from jcompress.trace.coupled.states import Hold, free_leaves

Asked = Mapping[int, list[tuple[At, At]]]
"""By the id of a site: the leaves of which it is computed at a slice that was cut, and those of them it sums over."""


def asked(frame: Frame, closed: jax_core.ClosedJaxpr, names: Mapping[Dim, str]) -> Asked:
    """What products of a frame, and of what it calls, are computed beside those of what stays.

    The function is traced once with a unit less in every group: which slices are computed where fewer groups are cut
    are those that need no other group.
    """
    if not any(map(_shares, _products(frame))):
        return {}
    cut = _Watched({leaf: np.arange(leaf.size - 1) for leaf in names if not leaf.pinned})

    def small(leaves: list[Any]) -> dict[int, Any]:
        values = [Value(cut, d, s, lambda at: None) for d, s in zip(frame.ins, frame.states, strict=True)]
        for value, x in zip(values, leaves, strict=True):
            value.known[NOWHERE] = x
        run(cut, frame, values)
        return {}

    pairs = zip(closed.in_avals, frame.ins, strict=True)
    jax.eval_shape(
        meshes.on_any_mesh(small, like=lambda _: {}), [meshes.struct(x, cut.shape(d, NOWHERE)) for x, d in pairs]
    )
    return {key: list(found) for key, found in cut.found.items()}


class _Watched(Cut):
    """Remembers what is computed at slices that were cut."""

    def __init__(self, kept: Mapping[Dim, np.ndarray]) -> None:
        super().__init__(kept)
        self.found: dict[int, dict[tuple[At, At], None]] = {}

    def ran(self, site: Site, at: At, summed: At = NOWHERE) -> None:
        if at:
            self.found.setdefault(id(site), {})[at, summed] = None


def counted(site: Site) -> list[Frame]:
    """The calls inside an equation that give its value: of a function with derivatives of its own only the first."""
    flow = primitives.row(site.eqn).flow
    if not isinstance(flow, Bodies):
        return []
    return site.frames if flow.is_choice else site.frames[: len(flow.closed(site.eqn))]


def _products(frame: Frame) -> Iterator[Site]:
    for site in frame.sites:
        if isinstance(primitives.row(site.eqn).flow, Contraction):
            yield site
        for inside in counted(site):
            yield from _products(inside)


def _shares(site: Site) -> bool:
    """Whether a product sums over slices that share a value which is not zero, or makes some."""
    made = any(site.states[0].at(leaf) is Hold.SAME for leaf in free_leaves(site.outs[0]))
    return made or bool(isinstance(site.note, list) and site.note)
