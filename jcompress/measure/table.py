"""The report: what each parameter costs after compression, and what it lost."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, io, rules
from jcompress.core import PyTree
from jcompress.measure.rows import Row, formats_of, make_row, measure
from jcompress.measure.units import in_bytes, in_thousands


def report(
    before: PyTree, after: PyTree, plan: Mapping[str, Any] | None = None, *, cost: Any = None, coded: bool = False
) -> Report:
    """Compare parameters with their compressed form, one row a parameter.

    Sizes are those of what ``jc.save`` writes for each parameter, to the bit. Values are compared one parameter at
    a time, where they are: the dense arrays are never all in memory at once.

    Args:
      before: the dense parameters.
      after: the same structure, with nodes or arrays in their place.
      plan: from :func:`jcompress.plan`, to show methods; without it the formats found are shown.
      cost: from :func:`jcompress.trace.cost`, of either tree, to show the multiply-adds of ``after``; the rows have its
        bit operations too.
      coded: whether to show what ``jc.save(..., coded=True)`` takes, to the byte; each parameter is coded to learn it.

    Returns:
      A :class:`Report`: print it, read ``.rows`` and ``.total``, or call ``.to_pandas()``.

    Raises:
      ValueError: if the two differ in structure or shape, ``before`` holds nodes, the plan or the cost is for
        other parameters, or the arrays are traced, as under ``jit``. The message names the path.

    Shapes serve as well, before there are weights: ``jc.report(shapes, jax.eval_shape(compress, shapes), plan)``. Sizes
    are then those of :func:`jcompress.nbits` for shapes, and no error is shown.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"kernel": jnp.arange(64.0).reshape(16, 4), "bias": jnp.zeros(4)}
      >>> plan = jc.plan(params, [("kernel", jc.prune.Magnitude(sparsity=0.75))])
      >>> print(jc.report(params, jc.compress(params, plan), plan))
      path    shape  density  bits/w  stored  index  ratio  error  method
      bias    4           0%   32.00    16 B      -   1.0x      0  dense
      kernel  16x4       25%    8.17    66 B    2 B   3.9x  0.647  Magnitude(sparsity=0.75)
      total   68       23.5%    9.57    82 B    2 B   3.3x  0.647
    """
    pairs = _matched(core.untie(before), core.untie(after))
    if plan is not None:
        _check_plan(plan, [path for path, _, _ in pairs])
    stored, dense = rules.leaves(core.opened(after)), rules.leaves(core.opened(before))
    measured = [measure(w, leaf, dense[path], stored[path]) for path, w, leaf in pairs]
    rows = [
        make_row(path, w.shape, str(w.dtype), _method(stored[path], plan[path] if plan is not None else None), [m])
        for (path, w, leaf), m in zip(pairs, measured, strict=True)
    ]
    total = make_row("total", (), "", "", measured)
    if cost is not None:
        found = {row.path: row for row in cost.compressed(after).rows}
        rows = [_with_cost(row, [found[row.path]] if row.path in found else []) for row in rows]
        total = _with_cost(total, list(found.values()))
    if coded:
        sizes = [io.nbits(stored[path], coded=True) / 8 for path, _, _ in pairs]
        rows = [dataclasses.replace(row, coded_bytes=size) for row, size in zip(rows, sizes, strict=True)]
        total = dataclasses.replace(total, coded_bytes=sum(sizes))
    return Report(tuple(rows), total, tuple(_notes(pairs, rows)))


def _with_cost(row: Row, costs: list[Any]) -> Row:
    """The row with the operations of these parameters; of a reference they are its owner's."""
    return dataclasses.replace(
        row,
        multiply_adds=sum(x.compressed_multiply_adds for x in costs),
        bit_operations=sum(x.compressed_bit_operations for x in costs),
    )


_VARIANCES = {"var": "mean", "variance": "mean", "running_var": "running_mean", "moving_variance": "moving_mean"}


def _notes(pairs: list[tuple[str, Any, Any]], rows: list[Row]) -> list[str]:
    """What is worth telling about running variances: that they are those of the dense weights, or near zero."""
    found = {row.path: row for row in rows}
    beside = {path: "/".join([*path.split("/")[:-1], _VARIANCES.get(path.split("/")[-1], "")]) for path in found}
    variances = {path for path, mean in beside.items() if mean in found and mean != path}
    statistics = {*variances, *(beside[path] for path in variances)}
    changed = any(row.relative_error > 0 for row in rows if row.path not in statistics)
    old = [path for path in found if path in variances and changed and found[path].relative_error == 0]
    collapsed = [path for path, w, leaf in pairs if path in variances - set(old) and _fell(w, leaf)]
    said = ((old, "running variances are those before compression"), (collapsed, "running variances fell to zero"))
    return [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {what}; see jc.rewrite.reestimate"
        for paths, what in said
        if paths
    ]


def _fell(before: Any, after: Any) -> bool:
    """Whether a variance is less than a thousandth of what it was, for any channel."""
    if isinstance(before, jax.ShapeDtypeStruct) or not core.is_concrete(after):
        return False
    return bool(jnp.any(core.dense(after) < 1e-3 * jnp.asarray(before)))


def _method(leaf: Any, method: Any) -> str:
    return repr(method) if method is not None else formats_of(leaf)


def _matched(before: PyTree, after: PyTree) -> list[tuple[str, Any, Any]]:
    """Path, dense array, and node or array, for each parameter."""
    left, right = rules.paths(before), rules.paths(after)
    for i, (a, b) in enumerate(itertools.zip_longest((p for p, _ in left), (p for p, _ in right))):
        if a != b:
            raise ValueError(
                f"report: the trees differ in structure; parameter {i} is {_named(a)} before and {_named(b)} after; "
                "give two trees of one structure, as jc.compress(before, plan) makes"
            )
    pairs = []
    for (path, w), (_, leaf) in zip(left, right, strict=True):
        if core.is_node(w):
            raise ValueError(
                f"{path}: found a {type(w).__name__} node in the first tree, expected the dense parameters; "
                "call report(before, after), or materialize it first"
            )
        if isinstance(w, (bool, int, float, complex, str)):
            continue  # Python scalars are settings, not parameters: they stand in the manifest of a file
        w, leaf = _as_array(path, w), leaf if core.is_node(leaf) else _as_array(path, leaf)
        _check_leaf(path, w, leaf)
        pairs.append((path, w, leaf))
    return pairs


def _named(path: str | None) -> str:
    return "missing" if path is None else repr(path)


def _as_array(path: str, x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not core.is_concrete(x):
        raise ValueError(f"{path}: report reads values, found {type(x).__name__}; call it outside jit")
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return x if hasattr(x, "dtype") and hasattr(x, "shape") else np.asarray(x, jnp.result_type(x))


def _check_leaf(path: str, w: Any, leaf: Any) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaf)):
        raise ValueError(f"{path}: report reads values, found an abstract {type(leaf).__name__}; call it outside jit")
    shape = jax.eval_shape(core.dense, leaf).shape
    if shape != w.shape:
        raise ValueError(
            f"{path}: found shape {shape} after, expected {w.shape} as before; give the parameters that were compressed"
        )


def _check_plan(plan: Mapping[str, Any], found: list[str]) -> None:
    for path in found:
        if path not in plan:
            raise ValueError(f"{path}: not in the plan; pass the plan that was made for these parameters, or none")


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The rows of :func:`report`, and their total.

    Attributes:
      rows: one :class:`Row` a parameter, in the order of the tree.
      total: all parameters together.
      notes: what else is worth telling, printed below the table: running variances of batch norms that no longer hold.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.ones((64, 32))}
      >>> found = jc.report(w, jc.compress(w, jc.plan(w, [("w", jc.quantize.Int(bits=4))])))
      >>> len(found.rows), found.total.stored_bytes
      (1, 1152.0)
    """

    rows: tuple[Row, ...]
    total: Row
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        t = self.total
        sizes = f"{in_bytes(t.stored_bytes)} of {in_bytes(t.dense_bytes)}"
        return f"Report({len(self.rows)} parameters, {sizes}, {_ratio(t.ratio)})"

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [*(_aligned(row, widths, table[0]) for row in table), *self.notes]
        return "\n".join(_clip(line, 120) for line in lines)

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        lines = [_html_row(head, "th"), *(_html_row(row, "td") for row in rows[:-1]), _html_row(rows[-1], "th")]
        return f"<table>{''.join(lines)}</table>{''.join(f'<p>{html.escape(note)}</p>' for note in self.notes)}"

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row a parameter, without the total.

        Raises:
          ImportError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError('to_pandas needs pandas; install it with pip install "jcompress[table]"') from error
        return pandas.DataFrame(list(self.rows), columns=[f.name for f in dataclasses.fields(Row)])

    def _cells(self) -> list[list[str]]:
        """The table as text: a header, the rows, the total. Kinds of cost that nothing has are left out."""
        kinds = [kind for kind in ("index", "codebook", "scale") if getattr(self.total, f"{kind}_bytes")]
        work = [] if self.total.multiply_adds is None else ["multiply-adds"]
        coded = [] if self.total.coded_bytes is None else ["coded"]
        head = ["path", "shape", "density", "bits/w", "stored", *coded, *kinds, "ratio", *work, "error", "method"]
        return [head, *(_row_cells(row, kinds) for row in (*self.rows, self.total))]


def _row_cells(row: Row, kinds: list[str]) -> list[str]:
    is_total = not row.dtype
    return [
        _elided(row.path, 36),
        str(row.size) if is_total else "x".join(map(str, row.shape)) or "scalar",
        _percent(row.density),
        f"{row.bits_per_weight:.2f}",
        in_bytes(row.stored_bytes),
        *([] if row.coded_bytes is None else [in_bytes(row.coded_bytes)]),
        *(in_bytes(cost) if cost else "-" for cost in (getattr(row, f"{kind}_bytes") for kind in kinds)),
        _ratio(row.ratio),
        *([] if row.multiply_adds is None else [in_thousands(row.multiply_adds)]),
        "-" if math.isnan(row.relative_error) else f"{row.relative_error:.3g}",
        row.method,
    ]


def _percent(density: float) -> str:
    """Never 0% of what has an entry, nor 100% of what lacks one."""
    shown = f"{100 * density:.3g}%"
    if shown == "100%" and density < 1:
        return ">99.9%"
    return f"{100 * density:.1g}%" if 0 < density < 1e-3 else shown


def _elided(path: str, width: int) -> str:
    """A path with its middle left out, if it is long: its ends tell most."""
    if len(path) <= width:
        return path
    kept = width - 1
    return f"{path[: kept // 3]}…{path[-(kept - kept // 3) :]}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f}x"


def _aligned(cells: list[str], widths: list[int], head: list[str]) -> str:
    """One line: text to the left, numbers to the right."""
    left = ("path", "shape", "method")
    columns = zip(cells, widths, head, strict=True)
    return "  ".join(x.ljust(width) if name in left else x.rjust(width) for x, width, name in columns).rstrip()


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _html_row(cells: list[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(x)}</{tag}>' for x in cells)}</tr>"
