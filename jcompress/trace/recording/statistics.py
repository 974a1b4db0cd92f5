"""What calibration knows about a parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.rules import Plan

FORWARD = ("gram", "count", "sum", "absmax", "norm", "zeros", "histogram", "outputs", "counts")
OF_LOSS = ("grad", "grad_square", "hessian_diagonal")
DEFAULT = ("gram", "count", "sum", "absmax", "norm", "zeros", "outputs", "counts")


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of a product, before any bias, by output channel; ``m`` are the parameter's other axes in their C order.

    Attributes:
      sum: float32 (..., m).
      square: float32 (..., m), the sum of squares.
      absmax: float32 (..., m).

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, [jnp.ones((4, 3))])
      >>> stats["w"].outputs.sum.tolist(), stats["w"].outputs.absmax.tolist()
      ([12.0, 12.0], [3.0, 3.0])
    """

    sum: Any
    square: Any
    absmax: Any

    def __repr__(self) -> str:
        return _shown(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Of the activation ``x`` that one parameter is contracted with, over all positions and batches.

    ``k`` is the size of the contracted axes of the parameter, flattened in the order in which the parameter has
    them: the input features of a dense kernel, (window, input channels) of a convolution. Leading axes (...) are
    layers stacked for ``jax.lax.scan``, experts of a batched product, or the groups of a grouped convolution, in the
    order of the parameter's axes. What was not gathered is None.

    Attributes:
      gram: float32 (..., k, k), the sum of ``x x^T``, computed in float32 at the highest precision. Of complex
        activations the sum of ``conj(x) x^T``: complex64 for a complex parameter, its real part for a real one, whose
        changes are real. Squares, ``absmax`` and histograms are of magnitudes then, and sums are complex64.
      count: uint32 (...), the number of positions. Padding of a convolution counts as zeros.
      sum: float32 (..., k).
      square: float32 (..., k), the sum of squares; ``norm`` is its root, or that of the diagonal of ``gram``.
      absmax: float32 (..., k).
      zeros: uint32 (..., k), how many were exactly 0.
      histogram: float32 (..., 320), how many magnitudes of all ``k`` features lay in each eighth of an octave from
        ``2**-24`` to ``2**16``: bin ``i`` starts at ``2**(i / 8 - 24)``. The first and last bins take what lies
        outside; zeros are in no bin.
      outputs: :class:`Outputs`; None where a part of the parameter is used at a time.
      counts: uint32 (rows,), how often each row of an embedding was read.
      grad: the mean gradient of the loss, in the shape of the parameter.
      grad_square: the mean of squared gradients.
      hessian_diagonal: an estimate of the diagonal of the loss's Hessian.
      others: the statistics of uses that contract other axes, such as the transpose in a tied autoencoder. The
        fields above are those of the axes that were contracted first.
      axes: the contracted axes, negative.
      layout: what all axes are in the product; None where parts of an axis play different roles.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, [jnp.array([[1.0, 2.0], [3.0, 4.0]])])
      >>> stats["w"].gram.tolist(), int(stats["w"].count)
      ([[10.0, 14.0], [14.0, 20.0]], 2)
    """

    gram: Any = None
    count: Any = None
    sum: Any = None
    square: Any = None
    absmax: Any = None
    zeros: Any = None
    histogram: Any = None
    outputs: Any = None
    counts: Any = None
    grad: Any = None
    grad_square: Any = None
    hessian_diagonal: Any = None
    others: tuple[Stats, ...] = ()
    axes: tuple[int, ...] = _static(())
    layout: core.Layout | None = _static(None)

    @property
    def norm(self) -> Any:
        """Float32 (..., k): the Euclidean norm of each feature over all positions."""
        if self.square is None and self.gram is not None:
            return jnp.sqrt(jnp.diagonal(self.gram, axis1=-2, axis2=-1).real)
        return None if self.square is None else jnp.sqrt(self.square)

    def __repr__(self) -> str:
        return _shown(self)


def _shown(x: Any) -> str:
    fields = [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
    return f"{type(x).__name__}({', '.join(f'{name}={_short(y)}' for name, y in fields if not _is_empty(y))})"


def _is_empty(x: Any) -> bool:
    return x is None or (isinstance(x, tuple) and not x)


def _short(x: Any) -> str:
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
    return repr(x)


class Calibration(Mapping):
    """``{path: Stats}`` of the parameters that could be read, and for the others the reason.

    A pytree: it passes through ``jit`` and into ``jc.compress(stats=...)``.

    Attributes:
      unread: paths that take part in a product which gives no statistic, each with the reason.
      notes: the other paths without statistics, each with what they do instead.
      levels: for each path, the number of products with parameters on the longest way to its first one, from 1.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"] + p["bias"], params, [jnp.ones((4, 3))])
      >>> list(stats), stats.levels["w"]
      (['w'], 1)
    """

    def __init__(
        self,
        stats: Mapping[str, Stats],
        unread: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
        levels: Mapping[str, int] | None = None,
    ) -> None:
        self._stats = dict(stats)
        self.unread, self.notes, self.levels = dict(unread or {}), dict(notes or {}), dict(levels or {})

    def __getitem__(self, path: str) -> Stats:
        if path not in self._stats and (reason := self.unread.get(path) or self.notes.get(path)):
            raise KeyError(f"{path}: no statistics: {reason}")
        return self._stats[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def get(self, path: str, default: Any = None) -> Any:
        """The statistics of a path, or the default."""
        return self._stats.get(path, default)

    def __contains__(self, path: object) -> bool:
        return path in self._stats

    def __repr__(self) -> str:
        return f"Calibration({len(self)} parameters, {len(self.unread)} unread)"

    def __str__(self) -> str:
        told = {**self._stats, **self.unread, **self.notes}
        width = max(map(len, told), default=0)
        return "\n".join(f"{path:<{width}}  {what}" for path, what in told.items())

    def merge(self, other: Calibration) -> Calibration:
        """The statistics of both together, as if their batches had been one pass. For forward statistics.

        Example:
          >>> import jax.numpy as jnp, jcompress as jc
          >>> fn = lambda params, x: x @ params["kernel"]
          >>> params = {"kernel": jnp.ones((2, 3))}
          >>> left, right = (jc.calibrate(fn, params, [jnp.full((4, 2), x)]) for x in (1.0, 2.0))
          >>> left.merge(right)["kernel"].gram.tolist()
          [[20.0, 20.0], [20.0, 20.0]]
        """
        both = {p: _merged(self[p], other[p]) for p in self if p in other}
        stats = {**self._stats, **other._stats, **both}
        unread = {**self.unread, **other.unread}
        stats = {path: s for path, s in stats.items() if path not in unread}
        notes = {**self.notes, **other.notes}
        return Calibration(stats, unread, notes, {**other.levels, **self.levels})


def _flatten(c: Calibration) -> tuple[Any, Any]:
    static = tuple(tuple(d.items()) for d in (c.unread, c.notes, c.levels))
    return tuple(c._stats.values()), (tuple(c._stats), static)


def _flatten_with_keys(c: Calibration) -> tuple[Any, Any]:
    children, static = _flatten(c)
    return tuple(zip(map(jax.tree_util.DictKey, c._stats), children, strict=True)), static


def _unflatten(static: Any, children: Iterable[Any]) -> Calibration:
    names, (unread, notes, levels) = static
    return Calibration(dict(zip(names, children, strict=True)), dict(unread), dict(notes), dict(levels))


jax.tree_util.register_pytree_with_keys(Calibration, _flatten_with_keys, _unflatten, _flatten)


def _merged(a: Any, b: Any) -> Any:
    """Two of :class:`Stats` or :class:`Outputs` as one."""
    if a is None or b is None:
        return b if a is None else a
    found: dict[str, Any] = {}
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.metadata.get("static"):
            found[field.name] = x or y
        elif field.name == "others":
            known = {s.axes: s for s in y}
            rest = [s for s in y if s.axes not in {t.axes for t in x}]
            found[field.name] = (*(_merged(s, known.get(s.axes)) for s in x), *rest)
        elif isinstance(x, Outputs) and isinstance(y, Outputs):
            found[field.name] = _merged(x, y)
        elif x is None or y is None:
            found[field.name] = y if x is None else x
        else:
            found[field.name] = jnp.maximum(x, y) if field.name == "absmax" else x + y
    return type(a)(**found)


def wanted(paths: Iterable[str], plan: Plan | None, statistics: Iterable[str] | None) -> dict[str, tuple[str, ...]]:
    """The statistics to gather for each path: those asked for, those that the plan's methods need, or the default."""
    if statistics is not None:
        names = tuple(statistics)
        return {path: names for path in paths if plan is None or plan[path] is not None}
    if plan is None:
        return dict.fromkeys(paths, DEFAULT)
    found: dict[str, tuple[str, ...]] = {}
    for path, method in plan.items():
        needs = () if method is None else core.needs(method)
        names = tuple(need.removeprefix("stats.") for need in needs if need.startswith("stats."))
        names += DEFAULT if "stats" in needs else ()
        if names:
            found[path] = ("count", *names)
    return found
