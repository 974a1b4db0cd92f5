"""Runs any function on compressed parameters: products with them are made as a policy says, the rest as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.trace.core import flow, walk
from jcompress.trace.core.views import (
    Activation,
    Derived,
    Joined,
    Kind,
    View,
    has_parameters,
    is_activation,
    parameters,
    whole,
)
from jcompress.trace.execution import contraction
from jcompress.trace.execution.contraction import Product
from jcompress.trace.execution.operands import Operand, dense, is_operand, of_leaf
from jcompress.trace.execution.weights import Policy, Range, Weight, side_by_side

Ranges = Mapping[str, Mapping[tuple[int, ...], Range]]


@dataclasses.dataclass(frozen=True)
class ProductRow:
    """One product of a parameter with an activation.

    Attributes:
      path: the parameter, or several that were computed into one.
      primitive: ``dot_general`` or ``conv_general_dilated``.
      shape: of the weight in the product.
      how: what is multiplied, and why if it is dense.
    """

    path: str
    primitive: str
    shape: tuple[int, ...]
    how: str


@dataclasses.dataclass(frozen=True)
class Products:
    """All products of a function with its parameters, one row each; prints as a table."""

    rows: tuple[ProductRow, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [("path", "product", "shape", "how")]
        cells += [(r.path, r.primitive, "x".join(map(str, r.shape)), r.how) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join((*(f"{x:<{w}}" for x, w in zip(c, widths, strict=False)), c[3])) for c in cells]
        return "\n".join([*lines, *self.notes])


@dataclasses.dataclass(frozen=True, eq=False)
class Executed:
    """A function of a tree of nodes and arrays, and of the other arguments: ``executed(tree, *args)``.

    Attributes:
      fn: the function of dense parameters.
      policy: how a product is made.
      ranges: for each path and each set of contracted axes, what is known of the activation.
      examples: ``(tree, *args)`` for :meth:`report`, as shapes; or None.
    """

    fn: Callable[..., Any]
    policy: Policy = dataclasses.field(repr=False)
    ranges: Ranges = dataclasses.field(default_factory=dict, repr=False)
    examples: tuple | None = dataclasses.field(default=None, repr=False)

    def __call__(self, tree: PyTree, *args: Any) -> Any:
        """The outputs of ``fn`` on the parameters that the tree stands for."""
        return self._run(tree, args)[0]

    def report(self, *examples: Any) -> Products:
        """How each product is made for ``(tree, *args)``, those given first by default; nothing is run."""
        found: list[Products] = []
        if not examples and self.examples is None:
            raise ValueError("report: pass the tree and the arguments, as to the function itself")

        def run(tree: PyTree, args: tuple) -> None:
            found.append(self._run(tree, args)[1])

        tree, *args = examples or self.examples or ()
        jax.eval_shape(run, tree, tuple(args))
        return found[0]

    def _run(self, tree: PyTree, args: tuple) -> tuple[Any, Products]:
        leaves, treedef = rules.paths(tree), jax.tree.structure(tree, is_leaf=core.is_node)
        shapes = [jax.eval_shape(core.dense, x) if core.is_node(x) else walk.shapes(x) for _, x in leaves]
        program = walk.program(self.fn, jax.tree.unflatten(treedef, shapes), *args)
        others = jax.tree.leaves(args)
        values: list[Any] = [of_leaf(path, x, self.ranges.get(path, {})) for path, x in leaves] + others
        kinds: list[Kind] = [whole(path, s.shape) for (path, _), s in zip(leaves, shapes, strict=True)]
        kinds += [Activation()] * len(others)
        run = _Run(self.policy, None if others else Activation())
        outs = run.jaxpr(program.closed.jaxpr, program.closed.consts, values, kinds)
        return jax.tree.unflatten(program.out_tree, outs), Products(tuple(run.rows.values()), tuple(run.notes))


class _Run:
    """One execution. Values are arrays or operands; each has its kind beside it."""

    def __init__(self, policy: Policy, constants: Kind) -> None:
        self.policy, self.constants = policy, constants
        self.rows: dict[Any, ProductRow] = {}
        self.notes: dict[str, None] = {}

    def jaxpr(
        self, jaxpr: jax_core.Jaxpr, consts: Sequence[Any], values: Sequence[Any], kinds: Sequence[Kind]
    ) -> list[Any]:
        """The outputs, as arrays."""
        return [dense(x) for x in self._inside(jaxpr, consts, values, kinds)]

    def _inside(
        self, jaxpr: jax_core.Jaxpr, consts: Sequence[Any], values: Sequence[Any], kinds: Sequence[Kind]
    ) -> list[Any]:
        env: dict[Any, tuple[Any, Kind]] = {}

        def read(v: Any) -> tuple[Any, Kind]:
            return (v.val, None) if isinstance(v, jax_core.Literal) else env[v]

        env.update((v, (c, self.constants)) for v, c in zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, zip(values, kinds, strict=True), strict=True))
        for eqn in jaxpr.eqns:
            known = list(map(read, eqn.invars))
            outs, out_kinds = self.equation(eqn, [x for x, _ in known], [k for _, k in known])
            env.update(zip(eqn.outvars, zip(outs, out_kinds, strict=True), strict=True))
        return [read(v)[0] for v in jaxpr.outvars]

    def equation(
        self, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind]
    ) -> tuple[list[Any], list[Kind]]:
        """The results of one equation, and their kinds."""
        kinds_out = flow.of_equation(eqn, kinds)
        name = eqn.primitive.name
        if not any(map(has_parameters, kinds)):
            return walk.bind(eqn, values), kinds_out
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, values, kinds), kinds_out
        if (called := walk.called(eqn)) is not None:
            return self._call(eqn, called, values, kinds), kinds_out
        if name in ("dot_general", "conv_general_dilated"):
            return [self._product(eqn, values, kinds)], kinds_out
        operands = [x for x in values if is_operand(x)]
        laid: list[Operand] | None = None
        if len(values) == 1 and operands:
            laid = operands[0].laid_out(eqn, kinds_out)
        elif name == "concatenate" and (joined := side_by_side(values, eqn, kinds_out[0])):
            laid = [joined]
        return laid or walk.bind(eqn, [dense(x) for x in values]), kinds_out

    def _product(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind]) -> Any:
        for side in (1, 0):
            mine, other, x = kinds[side], kinds[1 - side], values[1 - side]
            is_weight = has_parameters(mine) and not (isinstance(mine, Derived) and mine.lookup)
            product = contraction.read(eqn, side) if is_weight and is_activation(other) else None
            if product is not None and jnp.issubdtype(jnp.result_type(dense(x)), jnp.floating):
                return self._multiplied(eqn, product, dense(x), values[side], mine)
        return walk.bind(eqn, [dense(x) for x in values])[0]

    def _multiplied(self, eqn: jax_core.JaxprEqn, product: Product, x: Any, w: Any, kind: Kind) -> jax.Array:
        path = ", ".join(dict.fromkeys(parameters([kind], lookups=True)))
        operand = w if is_operand(w) else Weight(w, dtype=w.dtype, path=path)
        axes = _axes(product, kind)

        def multiply(product: Product, x: jax.Array, w: Weight) -> jax.Array:
            y, how = self.policy.multiply(product, x, w, axes)
            row = ProductRow(path, eqn.primitive.name, w.values.shape, how)
            self.rows.setdefault((id(eqn), row), row)
            return y

        return operand.product(product, x, multiply)

    def _call(
        self, eqn: jax_core.JaxprEqn, called: jax_core.ClosedJaxpr, values: Sequence[Any], kinds: Sequence[Kind]
    ) -> list[Any]:
        name = eqn.primitive.name
        if name in walk.REMAT:
            keep = {k: eqn.params[k] for k in ("policy", "prevent_cse") if k in eqn.params}
            again = jax.checkpoint(lambda *xs: self.jaxpr(called.jaxpr, called.consts, xs, kinds), **keep)
            return again(*values)
        if name.startswith("custom_"):
            if not _has_product(called.jaxpr):
                return walk.bind(eqn, [dense(x) for x in values])
            told = f"{eqn.params.get('name', name)}: its own derivative is lost, a parameter is multiplied inside"
            self.notes[told] = None
        return self._inside(called.jaxpr, called.consts, values, kinds)

    def scan(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind]) -> list[Any]:
        """A loop over slices; weights are sliced in their own form."""
        p, (n, carried) = eqn.params, walk.scan_parts(eqn)
        consts, carry, xs = values[:n], [dense(x) for x in values[n : n + carried]], values[n + carried :]
        inner = [k for part in flow.scanned(eqn, kinds) for k in part]
        closed = p["jaxpr"]

        def body(now: Sequence[Any], slices: Sequence[Any]) -> Any:
            outs = self.jaxpr(closed.jaxpr, closed.consts, [*consts, *now, *slices], inner)
            return outs[:carried], outs[carried:]

        stacked = [x.stacked() if is_operand(x) else x for x in xs]
        last, ys = lax.scan(body, carry, stacked, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return [*last, *ys]

    def while_(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind]) -> list[Any]:
        """A loop; weights that do not change keep their form."""
        p = eqn.params
        a, b = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        test, body, carry = flow.looped(eqn, kinds)
        condition, turn = p["cond_jaxpr"], p["body_jaxpr"]
        return lax.while_loop(
            lambda now: self.jaxpr(condition.jaxpr, condition.consts, [*values[:a], *now], [*test, *carry])[0],
            lambda now: self.jaxpr(turn.jaxpr, turn.consts, [*values[a:b], *now], [*body, *carry]),
            [dense(x) for x in values[b:]],
        )

    def cond(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind]) -> list[Any]:
        """Branches."""
        branches = [lambda *xs, b=b: self.jaxpr(b.jaxpr, b.consts, xs, kinds[1:]) for b in eqn.params["branches"]]
        return lax.switch(values[0], branches, *values[1:])

    def shard_map(self, eqn: jax_core.JaxprEqn, values: Sequence[Any], kinds: Sequence[Kind]) -> list[Any]:
        """What is mapped over devices is run as it is."""
        for path in parameters(kinds, lookups=False):
            self.notes[f"{path}: dense inside shard_map"] = None
        return walk.bind(eqn, [dense(x) for x in values])


_CONTROL: dict[str, Callable[..., list[Any]]] = {
    "scan": _Run.scan, "while": _Run.while_, "cond": _Run.cond, "shard_map": _Run.shard_map,
}  # fmt: skip


def _axes(product: Product, kind: Kind) -> tuple[int, ...]:
    """The axes of the parameter that a product sums over, negative and rising; none if they cannot be told."""
    part = kind.parts[0] if isinstance(kind, Joined) else kind
    if not isinstance(part, View):
        return ()
    axes = {a.axis for d in product.contracted for a in part.dims[d] if a.axis >= 0}
    return tuple(sorted(axis - len(part.shape) for axis in axes))


def _has_product(jaxpr: jax_core.Jaxpr) -> bool:
    """Whether there is a product in the equations or in what they call."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            return True
        inner: list[Any] = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        if any(_has_product(getattr(x, "jaxpr", x)) for x in inner if _is_jaxpr(x)):
            return True
    return False


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, (jax_core.Jaxpr, jax_core.ClosedJaxpr))
