"""Runs any function on compressed parameters: products with them are made as a policy says, the rest as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree
from jcompress.formats import Packed
from jcompress.trace.core import flow, walk
from jcompress.trace.core.bodies import Bodies, Call, Custom, Remat, ShardMap
from jcompress.trace.core.contraction import Product
from jcompress.trace.core.flow import Body, Step
from jcompress.trace.core.kinds import Contraction, Linear, Lookup, weight_side
from jcompress.trace.core.layouts import SideBySide
from jcompress.trace.core.loops import Scan, While
from jcompress.trace.core.views import Derived, Joined, Kind, View, parameters
from jcompress.trace.execution import rows
from jcompress.trace.execution.blocks import of_blocks
from jcompress.trace.execution.compact import Compact, of_packed
from jcompress.trace.execution.operands import dense, is_operand, of_leaf
from jcompress.trace.execution.weights import Policy, Range, Weight, side_by_side
from jcompress.trace.execution.words import Words, of_words

Ranges = Mapping[str, Mapping[tuple[int, ...], Range]]


@dataclasses.dataclass(frozen=True)
class ProductRow:
    """One product of a parameter with an activation.

    Attributes:
      path: the parameter, or several that were computed into one.
      primitive: its name.
      shape: of the weight in the product.
      how: what is multiplied, and why if it is dense.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> small = {"w": jc.factorize.SVD(rank=1)(jnp.ones((4, 4)))}
      >>> row = jc.accelerate(lambda p, x: x @ p["w"]).report(small, jnp.ones((1, 4))).rows[0]
      >>> row.path, row.primitive, row.shape
      ('w', 'dot_general', (4, 1))
    """

    path: str
    primitive: str
    shape: tuple[int, ...]
    how: str


@dataclasses.dataclass(frozen=True)
class Products:
    """All products of a function with its parameters, one row each; prints as a table.

    Attributes:
      rows: one a product.
      notes: what a reader should know beside them.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> small = {"w": jc.factorize.SVD(rank=1)(jnp.ones((4, 4)))}
      >>> len(jc.accelerate(lambda p, x: x @ p["w"]).report(small, jnp.ones((1, 4))).rows)
      2
    """

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

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.eye(4)}
      >>> small = jc.compress(params, jc.plan(params, [("w", jc.quantize.Int(bits=8))]))
      >>> fast = jc.accelerate(lambda p, x: x @ p["w"])
      >>> isinstance(fast, jc.trace.Executed), fast(small, jnp.ones((1, 4))).tolist()
      (True, [[1.0, 1.0, 1.0, 1.0]])
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
        packed = {path: x for path, x in walk.leaves(tree) if isinstance(x, Packed)}
        tree = core.untie(tree, whole=False)
        leaves = walk.leaves(tree)
        shapes = jax.tree.map(walk.shape_of, tree, is_leaf=core.is_node)
        program = walk.program(self.fn, shapes, *args)
        # A policy that changes activations sees every product, those of blocks too.
        blocks: Any = lambda path, x: None  # noqa: E731
        if getattr(self.policy, "by_blocks", False):
            kernels = getattr(self.policy, "kernels", None)
            blocks = lambda path, x: of_blocks(path, x, kernels) or of_words(path, x)  # noqa: E731
        values: list[Any] = []
        for path, x in leaves:
            known = dict(self.ranges.get(path, {}))
            values.append(of_packed(path, packed.get(path), known) or blocks(path, x) or of_leaf(path, x, known))
        run = _Run(self.policy, frozenset(path for path, x in leaves if core.is_node(x)))
        outs = run.arrays(flow.of_program(program), [*values, *jax.tree.leaves(args)])
        return jax.tree.unflatten(program.out_tree, outs), Products(tuple(run.rows.values()), tuple(run.notes))


class _Run:
    """One execution. Values are arrays or operands; each has its kind beside it.

    Args:
      policy: how a product is made.
      nodes: the paths of the parameters that are nodes.
    """

    def __init__(self, policy: Policy, nodes: frozenset[str]) -> None:
        self.policy, self.nodes = policy, nodes
        self.rows: dict[Any, ProductRow] = {}
        self.notes: dict[str, None] = {}

    def arrays(self, body: Body, values: Sequence[Any]) -> list[Any]:
        """The outputs of a body, as arrays."""
        return [dense(x) for x in body.run(values, self.equation)]

    def equation(self, step: Step, values: list[Any]) -> Sequence[Any]:
        """The results of one equation."""
        if not step.has_parameters:
            return walk.bind(step.eqn, values)
        if isinstance(step.flow, Bodies):
            return self._held(step, step.flow, values)
        if isinstance(step.flow, Contraction):
            return [self._product(step, step.flow, values)]
        if isinstance(step.flow, Lookup) and (found := _looked_up(step, values)) is not None:
            return [found]
        return self._laid_out(step, values) or walk.bind(step.eqn, [dense(x) for x in values])

    def _laid_out(self, step: Step, values: list[Any]) -> Sequence[Any] | None:
        """Operands in a form of their own, where the equation leaves them one."""
        if isinstance(step.flow, Linear):
            return None
        if len(values) == 1:
            return values[0].laid_out(step) if is_operand(values[0]) else None
        joined = side_by_side(values, step) if isinstance(step.flow, SideBySide) else None
        return [joined] if joined else None

    def _product(self, step: Step, made: Contraction, values: list[Any]) -> Any:
        side = weight_side(step.ins)
        if side is None:
            return walk.bind(step.eqn, [dense(x) for x in values])[0]
        product, x = made.of(step.eqn, side), dense(values[1 - side])
        is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        if product.obstacle or not is_float:
            w = dense(values[side])
            reason = product.obstacle or f"it meets an activation of dtype {x.dtype}"
            self._told(step, _path(step.ins[side]), w, f"dense: {reason}")
            return walk.bind(step.eqn, [*((x, w) if side else (w, x)), *map(dense, values[2:])])[0]
        return self._multiplied(step, product, x, values[side], step.ins[side])

    def _told(self, step: Step, path: str, w: Any, how: str) -> None:
        row = ProductRow(path, step.eqn.primitive.name, w.shape, how)
        self.rows.setdefault((id(step.eqn), row), row)

    def _multiplied(self, step: Step, product: Product, x: Any, w: Any, kind: Kind) -> jax.Array:
        path = _path(kind)
        note = _changed(kind) or ("taken apart before the product" if path in self.nodes else "")
        operand = w if is_operand(w) else Weight(w, dtype=w.dtype, path=path, note=note)
        axes = _axes(product, kind)

        def multiply(product: Product, x: jax.Array, w: Weight) -> jax.Array:
            y, how = self.policy.multiply(product, x, w, axes)
            self._told(step, path, w.values, how)
            return y

        def tell(shape: tuple[int, ...], how: str) -> None:
            self._told(step, path, jax.ShapeDtypeStruct(shape, product.dtype), how)

        return operand.product(product, x, multiply, tell)

    def _held(self, step: Step, holds: Bodies, values: list[Any]) -> Sequence[Any]:
        """An equation around bodies: weights that do not change keep their form inside."""
        if isinstance(holds, ShardMap):
            for path in parameters(step.ins, lookups=False):
                self.notes[f"{path}: dense inside shard_map"] = None
            return walk.bind(step.eqn, [dense(x) for x in values])
        if isinstance(holds, Custom):
            if not _has_product(step.bodies[0]):
                return walk.bind(step.eqn, [dense(x) for x in values])
            name = step.eqn.params.get("name", step.eqn.primitive.name)
            self.notes[f"{name}: its own derivative is lost, a parameter is multiplied inside"] = None
        if isinstance(holds, Call) and not isinstance(holds, Remat):
            return step.bodies[0].run(values, self.equation)
        bodies = [lambda *xs, body=body: self.arrays(body, xs) for body in step.bodies]
        return holds.around(step.eqn, self._crossing(step, holds, values), bodies)

    def _crossing(self, step: Step, holds: Bodies, values: list[Any]) -> list[Any]:
        """What a loop carries is dense, and what it slices has a leading axis in all its parts."""
        if not isinstance(holds, (Scan, While)):
            return values
        before, middle, last = holds.parts(step.eqn, values)
        if isinstance(holds, While):
            return [*before, *middle, *map(dense, last)]
        return [*before, *map(dense, middle), *(x.stacked() if is_operand(x) else x for x in last)]


def _looked_up(step: Step, values: Sequence[Any]) -> jax.Array | None:
    """Rows of a table, of which no others are made dense; None where it is no table of codes, or no rows are read."""
    table = values[0]
    if not isinstance(table, (Weight, Compact, Words)) or len(values) != 2 or is_operand(values[1]):
        return None
    lookup = rows.of_lookup(step.eqn, walk.aval(step.eqn.invars[0]).shape, values[1])
    return None if lookup is None else table.looked_up(lookup)


def _changed(kind: Kind) -> str:
    """What the function does to a parameter before a product, or nothing."""
    if isinstance(kind, Derived):
        return f"changed by {kind.reasons[-1][1]!r} before the product" if kind.reasons else ""
    return f"changed by {kind.changed!r} before the product" if isinstance(kind, View) and kind.changed else ""


def _path(kind: Kind) -> str:
    """The parameters that a weight is made of."""
    return ", ".join(dict.fromkeys(parameters([kind], lookups=True)))


def _axes(product: Product, kind: Kind) -> tuple[int, ...]:
    """The axes of the parameter that a product sums over, negative and rising; none if they cannot be told."""
    part = kind.parts[0] if isinstance(kind, Joined) else kind
    if not isinstance(part, View):
        return ()
    axes = {a.axis for d in product.contracted for a in part.dims[d] if a.axis >= 0}
    return tuple(sorted(axis - len(part.shape) for axis in axes))


def _has_product(body: Body) -> bool:
    """Whether there is a product in the equations or in what they call."""
    return any(isinstance(s.flow, Contraction) or any(map(_has_product, s.bodies)) for s in body.steps)
