"""What a function costs: multiply-adds, bytes and bit operations, by parameter and in total."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jcompress import core
from jcompress.core import PyTree
from jcompress.trace.core import flow, walk
from jcompress.trace.core.bodies import Bodies
from jcompress.trace.core.flow import Body, Step
from jcompress.trace.core.kinds import Contraction, weight_side
from jcompress.trace.core.views import parameters
from jcompress.trace.costs import operations as ops
from jcompress.trace.costs.tables import Cost, CostRow, weight_bits


def cost(fn: Callable[..., Any], params: PyTree, *args: Any) -> Cost:
    """Count what ``fn(params, *args)`` costs, dense and with its compressed parameters; nothing is run or compiled.

    ``flops`` follows XLA's cost analysis: two operations a multiply-add, products with padding left out, one an
    element for the rest. It differs from XLA where that counts the body of a loop once: here a ``scan`` counts
    ``length`` times. ``while`` counts once, as its trips are not known, and ``cond`` its dearest branch.

    The compressed counts are those of kernels that skip zeros, apply factors one after the other, and read codes at
    their width; whether a device has such kernels is another question.

    Args:
      fn: any JAX function.
      params: a pytree of arrays or compressed nodes, which are made dense to trace ``fn``. Shapes will do for arrays.
      *args: arrays, or their shapes and dtypes.

    Returns:
      A :class:`Cost`: print it, read ``.rows`` and ``.total``, or pass it to ``jc.report(before, after, cost=...)``.

    Raises:
      ValueError: for a node whose mask is abstract, as under ``jit``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: jnp.maximum(x @ params["a"], 0) @ params["b"]
      >>> params = {"a": jnp.ones((64, 32)), "b": jnp.ones((32, 10))}
      >>> plan = jc.plan(params, [("a", jc.prune.Magnitude(sparsity=0.75))])
      >>> print(jc.trace.cost(fn, jc.compress(params, plan), jnp.ones((8, 64))))
      path   shape  multiply-adds  compressed  bytes  stored  activations  bit operations
      a      64x32          16.4k        4.1k  8.19k   2.05k        3.07k           4.19M
      b      32x10          2.56k       2.56k  1.28k   1.28k        1.34k           2.62M
      total                 18.9k       6.66k  9.47k   3.33k        4.42k           6.82M
    """
    shapes = jax.tree.map(walk.shape_of, core.untie(params, whole=False), is_leaf=core.is_node)
    program = walk.program(fn, shapes, *args)
    tally = _Tally(dict(walk.leaves(shapes)))
    _count(flow.of_program(program), 1, tally)
    found = Cost(tuple(tally.rows()), tally.flops, tally.transcendentals, tally.between, tuple(tally.notes))
    return found.compressed(params)


@dataclasses.dataclass
class _Tally:
    """What has been counted so far."""

    params: dict[str, jax.ShapeDtypeStruct]
    flops: float = 0.0
    transcendentals: float = 0.0
    between: float = 0.0
    multiply_adds: dict[str, float] = dataclasses.field(default_factory=dict)
    activation_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    bits: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, other: _Tally) -> None:
        """Count what another has counted as well."""
        self.flops += other.flops
        self.transcendentals += other.transcendentals
        self.between += other.between
        for mine, theirs in (
            (self.multiply_adds, other.multiply_adds),
            (self.activation_bytes, other.activation_bytes),
        ):
            for path, n in theirs.items():
                mine[path] = mine.get(path, 0.0) + n
        for path, bits in other.bits.items():
            self.bits[path] = max(self.bits.get(path, 0), bits)
        self.notes |= other.notes

    def product(self, step: Step, made: Contraction, times: float) -> None:
        """One product: its multiply-adds go to the parameter in it, in parts if it was made of several."""
        eqn, side = step.eqn, weight_side(step.ins)
        count = made.of(eqn, 1 if side is None else side).multiply_adds()
        if side is None:
            self.between += count * times
            return
        other: Any = eqn.invars[1 - side].aval
        paths = parameters([step.ins[side]], lookups=False)
        sizes = [math.prod(self.params[path].shape) for path in paths]
        moved = _bytes(other) + _bytes(eqn.outvars[0].aval)
        for path, size in zip(paths, sizes, strict=True):
            share = times * size / max(sum(sizes), 1)
            self.multiply_adds[path] = self.multiply_adds.get(path, 0.0) + count * share
            self.activation_bytes[path] = self.activation_bytes.get(path, 0.0) + moved * share
            self.bits[path] = max(self.bits.get(path, 0), core.dtype_bits(other.dtype))

    def rows(self) -> list[CostRow]:
        """One row a parameter, dense."""
        rows = []
        for path, s in self.params.items():
            count, bits = self.multiply_adds.get(path, 0.0), self.bits.get(path, 0)
            size, wide = float(_bytes(s)), weight_bits(s)
            work = count * wide * bits
            moved = self.activation_bytes.get(path, 0.0)
            rows.append(CostRow(path, tuple(s.shape), count, count, size, size, moved, work, work))
        return rows


def _bytes(x: Any) -> float:
    return math.prod(x.shape) * weight_bits(x) / 8


def _count(body: Body, times: float, tally: _Tally) -> None:
    """Count the equations of a body that runs so often."""
    for step in body.steps:
        if isinstance(step.flow, Bodies):
            _inside(step, step.flow, times, tally)
            continue
        if isinstance(step.flow, Contraction):
            tally.product(step, step.flow, times)
        plain, transcendental = step.row.count(step.eqn)
        if step.row.count is ops.fourier:
            tally.between += plain / 2 * times
        if step.row.count is ops.UNKNOWN:
            name = step.eqn.primitive.name
            tally.notes[f"{name!r}: its products are not counted, only its results, one operation each"] = None
        tally.flops += plain * times
        tally.transcendentals += transcendental * times


def _inside(step: Step, holds: Bodies, times: float, tally: _Tally) -> None:
    """Count the bodies of an equation: all of them, or the dearest where one is chosen."""
    turns = holds.times(step.eqn)
    if turns is None:
        tally.notes[f"a {step.eqn.primitive.name} loop was counted once: its trips are not known"] = None
    found = []
    for body in step.bodies:
        found.append(_Tally(tally.params))
        _count(body, times * (1 if turns is None else turns), found[-1])
    for part in [max(found, key=lambda t: t.flops)] if holds.is_choice else found:
        tally.add(part)
