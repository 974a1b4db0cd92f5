"""A function read once: what each value of it has to do with the parameters, body by body. Nothing is run.

Calibration, execution and costs go through what stands here; none of them works out a kind of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from jax.extend import core as jax_core

from jcompress.trace import primitives
from jcompress.trace.core import places, walk
from jcompress.trace.core.kinds import Flow, Kinds, Lookup, at_places, places_of
from jcompress.trace.core.views import Activation, Kind, has_parameters, whole
from jcompress.trace.core.walk import Program
from jcompress.trace.primitives import Row


@dataclasses.dataclass(frozen=True)
class Step:
    """An equation.

    Attributes:
      eqn: the equation.
      row: what its primitive means.
      ins: the kinds of its operands.
      outs: the kinds of its results.
      bodies: what is inside, read.
    """

    eqn: jax_core.JaxprEqn
    row: Row
    ins: Kinds
    outs: Kinds
    bodies: list[Body]

    @property
    def flow(self) -> Flow:
        """What its primitive does with parameters."""
        return self.row.flow

    @property
    def has_parameters(self) -> bool:
        """Whether an operand is made of parameters."""
        return any(map(has_parameters, self.ins))


@dataclasses.dataclass(frozen=True)
class Body:
    """A jaxpr at one place where it is run.

    Attributes:
      closed: the jaxpr.
      ins: the kinds of its inputs.
      outs: the kinds of its outputs.
      steps: its equations.
      loop: how many loops, branches and meshes are around.
    """

    closed: jax_core.ClosedJaxpr
    ins: Kinds
    outs: Kinds
    steps: list[Step]
    loop: int

    def run(self, values: Sequence[Any], equation: Callable[[Step, list[Any]], Sequence[Any]]) -> list[Any]:
        """The outputs for some inputs, each equation computed as one says."""
        jaxpr = self.closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, self.closed.consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, jax_core.Literal) else env[v]

        for step in self.steps:
            env.update(zip(step.eqn.outvars, equation(step, list(map(read, step.eqn.invars))), strict=True))
        return list(map(read, jaxpr.outvars))


def of_program(program: Program, counted: Container[str] | None = None, mask: Sequence[int] | None = None) -> Body:
    """A function read: its parameters are what they are, and its arguments activations.

    Args:
      program: the traced function.
      counted: the paths that count as a level of their own; all by default.
      mask: the shape of a mask over the leading axes of the arguments, whose positions are to be followed.
    """
    closed, paths = program.closed, program.paths
    avals = [walk.aval(v) for v in closed.jaxpr.invars]
    kinds: Kinds = [
        whole(path, a.shape, 1 if counted is None or path in counted else 0)
        for path, a in zip(paths, avals, strict=False)
    ]
    others: Kinds = [
        Activation() if mask is None else Activation(places=places.of_argument(a.shape, mask))
        for a in avals[len(paths) :]
    ]
    # Where a function has no other arguments, what it closes over is its data.
    reading = Reading(constants=None if others else Activation(), follows=mask is not None)
    return reading.body(closed, [*kinds, *others])


@dataclasses.dataclass(frozen=True)
class Reading:
    """How bodies are read.

    Attributes:
      constants: the kind of what a function closes over: an activation, where it has no other arguments.
      loop: how many loops, branches and meshes are around.
      follows: whether positions are followed.
      names: of masks that are looked up on the way.
    """

    constants: Kind = None
    loop: int = 0
    follows: bool = False
    names: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def deeper(self) -> Reading:
        """Inside one more of them."""
        return dataclasses.replace(self, loop=self.loop + 1)

    def body(self, closed: jax_core.ClosedJaxpr, kinds: Sequence[Kind]) -> Body:
        """A body whose inputs have these kinds."""
        jaxpr, steps = closed.jaxpr, []
        env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars, self.constants)
        env.update(zip(jaxpr.invars, kinds, strict=True))

        def read(v: Any) -> Kind:
            return None if isinstance(v, jax_core.Literal) else env[v]

        for eqn in walk.equations(jaxpr):
            row, ins = primitives.row(eqn), list(map(read, eqn.invars))
            bodies = row.flow.bodies(eqn, ins, self)
            outs = row.flow.results(eqn, ins, bodies)
            if self.follows and not bodies:
                outs = _placed(eqn, row, ins, outs, self.names)
            steps.append(Step(eqn, row, ins, outs, bodies))
            env.update(zip(eqn.outvars, outs, strict=True))
        return Body(closed, list(kinds), list(map(read, jaxpr.outvars)), steps, self.loop)


def _placed(eqn: jax_core.JaxprEqn, row: Row, ins: Kinds, outs: Kinds, names: Iterator[int]) -> Kinds:
    """The results with where their positions stand in the mask."""
    views = [places_of(k, getattr(v.aval, "shape", ())) for k, v in zip(ins, eqn.invars, strict=True)]
    found = row.flow.places(eqn, views)
    if isinstance(row.flow, Lookup) and views[0] is not None and not places.is_nowhere(views[0]):
        found = [view and places.looked_up(view, f"looked up {next(names)}") for view in found]
    return [at_places(k, view) for k, view in zip(outs, found, strict=True)]
