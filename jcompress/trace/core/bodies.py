"""What holds bodies of equations: calls and meshes here, loops and branches beside.

Each says once which operands each body takes, what its results are made of, how often it runs, and how it runs anew
around other bodies. All readings go by that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core

from jcompress.trace.core.kinds import Flow, Kinds, Reader
from jcompress.trace.core.layouts import local
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    shards,
    spec_axes,
)

Run = Callable[..., tuple[list[Any], Any]]
"""A body on values: its outputs, and whatever else was found while it ran."""
Add = Callable[[Any, Any], tuple[Any, Any]]
"""Totals and what one run found -> new totals, and what is left of that run."""


def nothing(totals: Any, found: Any) -> tuple[None, None]:
    """Keep no totals."""
    return None, None


def listed_outputs(run: Run) -> Run:
    """A body whose outputs come as a list."""

    def listed(*xs: Any) -> tuple[list[Any], Any]:
        outs, found = run(*xs)
        return list(outs), found

    return listed


class Bodies(Flow):
    """An equation that runs bodies of equations.

    Attributes:
      is_choice: whether one of the bodies runs, and not all of them.
    """

    is_choice = False

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        """The bodies."""
        raise NotImplementedError

    def times(self, eqn: jax_core.JaxprEqn) -> int | None:
        """How often they run; None if that is not known."""
        return 1

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = nothing,
    ) -> tuple[list[Any], Any, Any]:
        """The equation around other bodies: its results, the totals, and what was left (stacked, of a loop)."""
        raise NotImplementedError

    def around(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], bodies: Sequence[Callable[..., Any]]) -> list[Any]:
        """The results of the equation around other bodies."""
        runs = [lambda *xs, body=body: (list(body(*xs)), None) for body in bodies]
        return self.again(eqn, values, runs, None, nothing)[0]


class Call(Bodies):
    """A call of one function on the operands as they are."""

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        found = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if name in eqn.params)
        return [found if isinstance(found, jax_core.ClosedJaxpr) else jax_core.ClosedJaxpr(found, ())]

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        return [reader.body(self.closed(eqn)[0], kinds)]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        return bodies[0].outs


class Custom(Call):
    """A function with derivatives of its own."""


class Remat(Call):
    """A function that is computed again in the backward pass."""

    def around(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], bodies: Sequence[Callable[..., Any]]) -> list[Any]:
        keep = {name: eqn.params[name] for name in ("policy", "prevent_cse") if name in eqn.params}
        return jax.checkpoint(bodies[0], **keep)(*values)


class ShardMap(Bodies):
    """A body on every device, each with its part of the operands."""

    def is_read(self, eqn: jax_core.JaxprEqn) -> bool:
        """Whether this version of jax can run it anew."""
        return "in_specs" in eqn.params and hasattr(jax, "shard_map")

    def closed(self, eqn: jax_core.JaxprEqn) -> list[jax_core.ClosedJaxpr]:
        return [jax_core.ClosedJaxpr(getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]), ())]

    def times(self, eqn: jax_core.JaxprEqn) -> int | None:
        """Once on each device."""
        return math.prod(eqn.params["mesh"].shape.values())

    def manual(self, eqn: jax_core.JaxprEqn) -> frozenset[str]:
        """The mesh axes that it maps over."""
        return frozenset(eqn.params.get("newly_manual_axes") or eqn.params["mesh"].axis_names)

    def bodies(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], reader: Reader) -> list[Any]:
        (closed,), name = self.closed(eqn), eqn.primitive.name
        specs = eqn.params.get("in_specs", [()] * len(kinds))
        held = [_held(k, spec, v, name) for k, spec, v in zip(kinds, specs, closed.jaxpr.invars, strict=True)]
        return [reader.deeper().body(closed, held)]

    def results(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], bodies: Sequence[Any]) -> Kinds:
        found, manual = [computed(eqn.primitive.name, [k]) for k in bodies[0].outs], self.manual(eqn)
        return [
            dataclasses.replace(k, shards=shards([k]) - manual, places=None)
            if isinstance(k, (Activation, Derived))
            else None
            for k in found
        ]

    def again(
        self,
        eqn: jax_core.JaxprEqn,
        values: Sequence[Any],
        runs: Sequence[Run],
        totals: Any = None,
        add: Add = nothing,
    ) -> tuple[list[Any], Any, Any]:
        """What is found must be the same on all devices."""
        p = eqn.params
        mapped = jax.shard_map(
            listed_outputs(runs[0]),
            mesh=p["mesh"],
            in_specs=tuple(p["in_specs"]),
            out_specs=(list(p["out_specs"]), jax.sharding.PartitionSpec()),
            axis_names=self.manual(eqn),
            check_vma=p.get("check_vma", True),
        )
        outs, found = mapped(*values)
        return outs, *add(totals, found)


def _held(kind: Kind, spec: Any, v: Any, name: str) -> Kind:
    """What one device holds of a value."""
    if isinstance(kind, View):
        part = local(kind, spec, v.aval.shape)
        return computed(name, [kind]) if part is None else part
    if isinstance(kind, Joined):
        return computed(kind.name, [kind])
    return kind if kind is None else dataclasses.replace(kind, shards=kind.shards | spec_axes(spec), places=None)
