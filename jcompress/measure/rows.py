"""One parameter after compression: what it costs, by kind, and what it lost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.measure.ratios import compression_ratio
from jcompress.numeric.counting import counted

_KINDS = {"mask": "index", "codebook": "codebook", "scale": "scale", "zero": "scale"}
"""What the arrays under a field are for; those under any other field are values."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, or all of them together.

    All sizes are in bytes, as floats: exact, in steps of an eighth, since codes are packed to the bit.

    Attributes:
      path: where the parameter is, or ``"total"``.
      shape: of the dense array; empty for the total.
      dtype: of the dense array before; empty for the total.
      method: what the plan names, or the nest of formats, such as ``Masked(Codebook)``; ``"dense"`` for an array.
      size: the number of weights.
      density: the part of them that is not zero; 1 if there are none.
      bits_per_weight: stored bits / size, everything included; 0 if there are no weights.
      stored_bytes: what is saved, the sum of the next four.
      value_bytes: kept values, codes, factors and assignments.
      index_bytes: masks as coded: which entries are kept.
      codebook_bytes: tables of shared values.
      scale_bytes: scales and zero points.
      dense_bytes: what the dense array took.
      ratio: ``dense_bytes / stored_bytes``.
      relative_error: ``||w - w'|| / ||w||``, Frobenius norms; 0 if both are zero, NaN of shapes alone. The
        total's is over all floating-point parameters as one vector.
      multiply_adds: of one call, by the cost that was given to the report; else None.
      bit_operations: likewise: multiply-adds x bits of the weight x bits of the activation.
      coded_bytes: what an entropy-coded file takes, if the report was asked for it; else None.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> row = jc.report(w, jc.compress(w, jc.plan(w, [("w", jc.prune.Magnitude(sparsity=0.5))]))).rows[0]
      >>> row.path, row.density, row.value_bytes, row.relative_error
      ('w', 0.5, 8.0, 0.0)
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    size: int
    density: float
    bits_per_weight: float
    stored_bytes: float
    value_bytes: float
    index_bytes: float
    codebook_bytes: float
    scale_bytes: float
    dense_bytes: float
    ratio: float
    relative_error: float
    multiply_adds: float | None = None
    bit_operations: float | None = None
    coded_bytes: float | None = None

    @property
    def coded_bits_per_weight(self) -> float | None:
        """Bits a weight in an entropy-coded file; None where they were not asked for."""
        if self.coded_bytes is None:
            return None
        return 8 * self.coded_bytes / self.size if self.size else 0.0


class _Norms(NamedTuple):
    """Sums over one parameter; the squares are of entries divided by ``unit``, so that they cannot overflow."""

    nonzeros: Any
    unit: Any
    square: Any
    error: Any


class Measured(NamedTuple):
    """What rows and the total are made of. ``bits`` is by kind."""

    size: int
    nonzeros: int
    bits: Mapping[str, int]
    dense_bits: int
    square: float
    error: float
    counted: bool


def measure(w: Any, leaf: Any, before: Any = None, after: Any = None) -> Measured:
    """Compare one dense array with the node or array that stands for it.

    Args:
      w: the array.
      leaf: what stands for it.
      before: what the tree holds of ``w``, if that is less: a reference.
      after: the same for ``leaf``.
    """
    bits = _bits(leaf if after is None else after)
    dense_bits = core.leaf_nbits(w if before is None else before)
    if is_abstract(w) or is_abstract(leaf):
        return _measured_from_shapes(w, leaf, bits, dense_bits)
    norms = jax.device_get(_norms(w, leaf))
    unit, is_counted = float(norms.unit) ** 2, jnp.issubdtype(w.dtype, jnp.inexact)
    return Measured(
        size=math.prod(w.shape),
        nonzeros=int(norms.nonzeros),
        bits=bits,
        dense_bits=dense_bits,
        square=unit * float(norms.square),
        error=unit * float(norms.error),
        counted=bool(is_counted),
    )


def is_abstract(x: Any) -> bool:
    """Whether ``x`` is, or holds, the shape of an array in place of its values."""
    return any(isinstance(y, jax.ShapeDtypeStruct) for y in jax.tree.leaves(x))


def _measured_from_shapes(w: Any, leaf: Any, bits: Mapping[str, int], dense_bits: int) -> Measured:
    """The same of shapes: sizes as ``jc.nbits`` expects them, and no error."""
    size = math.prod(w.shape)
    expected = getattr(leaf, "expected", None)
    return Measured(
        size=size,
        nonzeros=size if expected is None else expected.count(size),
        bits=bits,
        dense_bits=dense_bits,
        square=math.nan,
        error=math.nan,
        counted=bool(jnp.issubdtype(w.dtype, jnp.inexact)),
    )


@jax.jit
def _norms(w: Any, leaf: Any) -> _Norms:
    value = core.dense(leaf)
    # By hand, since 8-bit floats refuse promotion.
    wide = jnp.result_type(complex if jnp.iscomplexobj(w) or jnp.iscomplexobj(value) else float)
    x, y = w.astype(wide), value.astype(wide)
    largest = jnp.maximum(jnp.max(jnp.abs(x), initial=0), jnp.max(jnp.abs(y), initial=0))
    unit = jnp.where(largest > 0, largest, 1)
    return _Norms(
        nonzeros=counted(value != 0),
        unit=unit,
        square=jnp.sum(jnp.abs(x / unit) ** 2),
        error=jnp.sum(jnp.abs(x / unit - y / unit) ** 2),
    )


def _bits(leaf: Any) -> dict[str, int]:
    """Stored bits by kind."""
    bits = dict.fromkeys(("value", "index", "codebook", "scale"), 0)
    if not core.is_node(leaf):
        return bits | {"value": core.leaf_nbits(leaf)}
    for part in core.parts(leaf):
        bits[_kind(part.name)] += part.nbits
    return bits


def _kind(name: str) -> str:
    """The outermost field of known kind decides: a codebook's own scales are part of what the codebook costs."""
    return next((_KINDS[field] for field in name.split("/") if field in _KINDS), "value")


def formats_of(leaf: Any) -> str:
    """The formats of a node, nested ones in parentheses."""
    if not core.is_node(leaf):
        return "dense"
    if isinstance(leaf, core.Reference):
        return f"Reference({leaf.owner})"
    inner = [formats_of(x) for x in _children(leaf)]
    return f"{type(leaf).__name__}({', '.join(inner)})" if inner else type(leaf).__name__


def _children(node: Compressed) -> list[Any]:
    fields = dataclasses.fields(node)  # type: ignore[arg-type]  # every format is a dataclass
    values = [getattr(node, f.name) for f in fields if not f.metadata.get("static")]
    return [x for x in jax.tree.leaves(values, is_leaf=core.is_node) if core.is_node(x)]


def make_row(path: str, shape: tuple[int, ...], dtype: str, method: str, measured: Iterable[Measured]) -> Row:
    """The row of one parameter, or of many together."""
    measured = list(measured)
    size, nonzeros = sum(m.size for m in measured), sum(m.nonzeros for m in measured)
    kinds = {
        f"{kind}_bytes": sum(m.bits[kind] for m in measured) / 8 for kind in ("value", "index", "codebook", "scale")
    }
    stored, before = sum(kinds.values()), sum(m.dense_bits for m in measured) / 8
    chosen = measured if len(measured) == 1 else [m for m in measured if m.counted]
    return Row(
        path=path,
        shape=tuple(shape),
        dtype=dtype,
        method=method,
        size=size,
        density=nonzeros / size if size else 1.0,
        bits_per_weight=8 * stored / size if size else 0.0,
        stored_bytes=stored,
        **kinds,
        dense_bytes=before,
        ratio=compression_ratio(before, stored),
        relative_error=_relative(sum(m.error for m in chosen), sum(m.square for m in chosen)),
    )


def _relative(error: float, square: float) -> float:
    if square == 0:
        return 0.0 if error == 0 else math.inf if error > 0 else math.nan
    if math.isnan(square):
        return math.nan
    return math.sqrt(error / square)
