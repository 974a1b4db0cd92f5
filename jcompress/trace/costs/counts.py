"""What a function costs: multiply-adds, bytes and bit operations, by parameter and in total."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.trace.core import walk
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    computed,
    has_parameters,
    join,
    laid_out,
    local,
    peel,
    whole,
)
from jcompress.trace.costs import operations
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
    leaves, treedef = rules.paths(params), jax.tree.structure(params, is_leaf=core.is_node)
    shapes = [jax.eval_shape(core.dense, x) if core.is_node(x) else walk.shapes(x) for _, x in leaves]
    program = walk.program(fn, jax.tree.unflatten(treedef, shapes), *args)
    tally = _Tally({path: s for (path, _), s in zip(leaves, shapes, strict=True)})
    inputs: list[Kind] = [whole(path, s.shape) for (path, _), s in zip(leaves, shapes, strict=True)]
    invars = program.closed.jaxpr.invars
    _count(program.closed.jaxpr, [*inputs, *[Activation()] * (len(invars) - len(inputs))], 1, tally)
    found = Cost(tuple(tally.rows()), tally.flops, tally.transcendentals, tally.between, tuple(tally.notes))
    return found.compressed(params)


def _is_table(field: dataclasses.Field) -> bool:
    return str(field.type).startswith("dict")


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

    def branch(self) -> _Tally:
        """A copy that counts on its own."""
        copied: dict[str, Any] = {f.name: dict(getattr(self, f.name)) for f in dataclasses.fields(self) if _is_table(f)}
        return dataclasses.replace(self, **copied)

    def take(self, other: _Tally) -> None:
        """Become another."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))

    def product(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind], times: float) -> None:
        """One product: its multiply-adds go to the parameter in it, in parts if it was made of several."""
        dot = eqn.primitive.name == "dot_general"
        count = operations.multiply_adds_of_dot(eqn) if dot else operations.multiply_adds_of_convolution(eqn, True)
        side = next((i for i in (1, 0) if has_parameters(kinds[i]) and not _is_lookup(kinds[i])), None)
        if side is None:
            self.between += count * times
            return
        other: Any = eqn.invars[1 - side].aval
        paths = _paths(kinds[side])
        sizes = [math.prod(self.params[path].shape) for path in paths]
        moved = _bytes(other) + _bytes(eqn.outvars[0].aval)
        for path, size in zip(paths, sizes, strict=True):
            part = count * times * size / max(sum(sizes), 1)
            self.multiply_adds[path] = self.multiply_adds.get(path, 0.0) + part
            self.bits[path] = max(self.bits.get(path, 0), core.dtype_bits(other.dtype))
            share = moved * times * size / max(sum(sizes), 1)
            self.activation_bytes[path] = self.activation_bytes.get(path, 0.0) + share

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


def _paths(kind: Kind) -> list[str]:
    if isinstance(kind, Joined):
        return [part.path for part in kind.parts]
    return [kind.path] if isinstance(kind, View) else [p for p, _ in kind.reasons] if isinstance(kind, Derived) else []


def _is_lookup(kind: Kind) -> bool:
    return isinstance(kind, Derived) and kind.lookup


def _bytes(x: Any) -> float:
    return math.prod(x.shape) * weight_bits(x) / 8


def _count(jaxpr: jax_core.Jaxpr, kinds: Sequence[Kind], times: float, tally: _Tally) -> list[Kind]:
    """Count a jaxpr's equations; returns the kinds of its outputs."""
    env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars)
    env.update(zip(jaxpr.invars, kinds, strict=True))

    def read(v: Any) -> Kind:
        return None if isinstance(v, jax_core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        outs = _equation(eqn, list(map(read, eqn.invars)), times, tally)
        env.update(zip(eqn.outvars, outs, strict=True))
    return list(map(read, jaxpr.outvars))


def _equation(eqn: jax_core.JaxprEqn, kinds: list[Kind], times: float, tally: _Tally) -> list[Kind]:
    name = eqn.primitive.name
    called = walk.called(eqn)
    if called is not None:
        return _count(called.jaxpr, kinds, times, tally)
    if name in _CONTROL:
        return _CONTROL[name](eqn, kinds, times, tally)
    if name in ("dot_general", "conv_general_dilated"):
        tally.product(eqn, kinds, times)
    flops, transcendentals = operations.operations(eqn)
    tally.flops += flops * times
    tally.transcendentals += transcendentals * times
    if name in ("gather", "dynamic_slice") and has_parameters(kinds[0]):
        made = computed(name, kinds[:1])
        chosen = any(isinstance(k, Activation) for k in kinds[1:])
        return [dataclasses.replace(made, lookup=True) if chosen and isinstance(made, Derived) else made]
    return laid_out(eqn, kinds) or [computed(name, kinds)] * len(eqn.outvars)


def _scan(eqn: jax_core.JaxprEqn, kinds: list[Kind], times: float, tally: _Tally) -> list[Kind]:
    p = eqn.params
    consts, carry = walk.scan_parts(eqn)
    split = consts + carry
    slices = [peel(k, 0) for k in kinds[split:]]
    return _loop(p["jaxpr"], kinds[:consts], kinds[consts:split], slices, times * p["length"], tally)


def _loop(
    closed: jax_core.ClosedJaxpr, before: list[Kind], carry: list[Kind], after: list[Kind], times: float, tally: _Tally
) -> list[Kind]:
    n = len(carry)
    while True:
        trial = tally.branch()
        outs = _count(closed.jaxpr, [*before, *carry, *after], times, trial)
        joined = [join("carry", pair) for pair in zip(carry, outs[:n], strict=True)]
        if joined == carry:
            tally.take(trial)
            return [*carry, *(computed("scan", [k]) for k in outs[n:])]
        carry = joined


def _while(eqn: jax_core.JaxprEqn, kinds: list[Kind], times: float, tally: _Tally) -> list[Kind]:
    p = eqn.params
    tests, split = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    tally.notes["a while loop was counted once: its trips are not known"] = None
    _count(p["cond_jaxpr"].jaxpr, [*kinds[:tests], *kinds[split:]], times, tally)
    return _loop(p["body_jaxpr"], kinds[tests:split], kinds[split:], [], times, tally)


def _cond(eqn: jax_core.JaxprEqn, kinds: list[Kind], times: float, tally: _Tally) -> list[Kind]:
    trials = [tally.branch() for _ in eqn.params["branches"]]
    outs = [
        _count(branch.jaxpr, kinds[1:], times, trial)
        for branch, trial in zip(eqn.params["branches"], trials, strict=True)
    ]
    tally.take(max(trials, key=lambda t: t.flops))
    return [join("cond", column) for column in zip(*outs, strict=True)]


def _shard_map(eqn: jax_core.JaxprEqn, kinds: list[Kind], times: float, tally: _Tally) -> list[Kind]:
    """The body runs once on each device."""
    shards = math.prod(eqn.params["mesh"].shape.values())
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    specs = eqn.params.get("in_specs", [()] * len(kinds))
    inner = [
        local(k, spec, _aval(v).shape) if isinstance(k, View) else computed("shard_map", [k])
        for k, spec, v in zip(kinds, specs, body.invars, strict=True)
    ]
    return [computed("shard_map", [k]) for k in _count(body, inner, times * shards, tally)]


def _aval(v: Any) -> Any:
    return v.aval


_CONTROL: dict[str, Callable[..., list[Kind]]] = {
    "scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map,
}  # fmt: skip
