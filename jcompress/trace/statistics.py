"""What calibration knows about a parameter, and one pass of data through any function that gathers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree
from jcompress.rules import Plan
from jcompress.trace import record, walk
from jcompress.trace.products import Use
from jcompress.trace.views import Activation, whole

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
      gram: float32 (..., k, k), the sum of ``x x^T``, computed in float32 at the highest precision.
      count: uint32 (...), the number of positions. Padding of a convolution counts as zeros.
      sum: float32 (..., k).
      square: float32 (..., k), the sum of squares; ``norm`` is its root.
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

    @property
    def norm(self) -> Any:
        """Float32 (..., k): the Euclidean norm of each feature over all positions."""
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
            found[field.name] = x
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


def observe(
    fn: Callable[..., Any], params: PyTree, *args: Any, statistics: Any = DEFAULT, largest: int | None = None
) -> tuple[Any, Calibration]:
    """Run ``fn(params, *args)``, and gather what each parameter meets.

    Pure: works under ``jit``, ``vmap`` over arguments, and sharding, and the outputs are those of ``fn``. The
    function is traced and run equation by equation. A parameter is followed through changes of layout (transpose,
    reshape, slice, cast, loops) to the products and lookups in which it meets an activation.

    Uses that contract the same axes are summed, parts of the outputs that read one activation count once, a loop
    sums over its iterations, and ``cond`` counts the branch that was taken.

    Args:
      fn: any JAX function.
      params: a pytree of arrays.
      *args: the other arguments of ``fn``. With none, what ``fn`` closes over counts as activations.
      statistics: names of fields of :class:`Stats`, for all parameters; or ``{path: names}``.
      largest: leave out Gram matrices of more features than this.

    Returns:
      ``(outputs, calibration)``, the latter a :class:`Calibration`: a mapping from paths to :class:`Stats`, with
      ``.unread`` for those whose products give none, such as a kernel that was normalised first.

    Raises:
      ValueError: for an unknown statistic, or a compressed node among the parameters.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> y, stats = jc.trace.observe(fn, {"kernel": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0]]))
      >>> stats["kernel"].gram.tolist()
      [[1.0, 2.0], [2.0, 4.0]]
    """
    program = walk.program(fn, params, *args)
    wanted = statistics if isinstance(statistics, Mapping) else dict.fromkeys(program.paths, statistics)
    values = jax.tree.leaves((params, *args))
    constants = None if len(values) > len(program.paths) else Activation()
    found = record.Found({path: _moments(path, names) for path, names in wanted.items()}, constants, largest)
    kinds = _kinds(program, values)
    tape = record.Tape(found)
    outs, _ = record.evaluate(program.closed.jaxpr, program.closed.consts, values, kinds, tape)
    uses = tape.close()
    return jax.tree.unflatten(program.out_tree, outs), _collected(uses, found, program)


def _kinds(program: walk.Program, values: list[Any]) -> list[Any]:
    n = len(program.paths)
    views = [whole(path, jnp.shape(x)) for path, x in zip(program.paths, values[:n], strict=True)]
    return [*views, *[Activation()] * (len(values) - n)]


def _moments(path: str, names: Iterable[str]) -> frozenset[str]:
    names = frozenset(names)
    if unknown := sorted(names - {*FORWARD, *OF_LOSS, "square"}):
        raise ValueError(f"{path}: unknown statistic {unknown[0]!r}; there are {', '.join((*FORWARD, *OF_LOSS))}")
    return frozenset("square" if name == "norm" else name for name in names - set(OF_LOSS))


def _collected(uses: Mapping[Use, record.Moments], found: record.Found, program: walk.Program) -> Calibration:
    """Uses as statistics by path, in the order of the parameters."""
    by_path: dict[str, dict[Any, list[Use]]] = {path: {} for path in program.paths}
    for use in uses:
        if use.path not in found.unread and found.wanted.get(use.path):
            by_path[use.path].setdefault(_kind_of(use, uses[use]), []).append(use)
    stats = {
        path: _stats([_total(group, uses) for group in groups.values()]) for path, groups in by_path.items() if groups
    }
    used = {v for eqn in program.closed.jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    used |= {v for v in program.closed.jaxpr.outvars if not hasattr(v, "val")}
    notes = dict(found.notes)
    for path, var in zip(program.paths, program.closed.jaxpr.invars, strict=False):
        if var not in used:
            notes[path] = "not used"
        elif path not in stats and path not in found.unread and path not in found.met:
            notes[path] = "in no product with an activation"
    return Calibration(stats, found.unread, notes, found.levels)


def _kind_of(use: Use, moments: record.Moments) -> Any:
    """What uses have in common whose moments add up, once layers used one by one stand at their places."""
    lead = tuple((a.axis, 1, use.shape[a.axis]) if a.axis in use.embed else (a.axis, a.step, a.size) for a in use.lead)
    return "counts" in moments, use.axes, lead


def _total(group: list[Use], uses: Mapping[Use, record.Moments]) -> tuple[Use, record.Moments]:
    """The moments of uses that differ at most in which layers they are of."""
    first, total = group[0], dict[str, jax.Array]()
    if not first.embed:
        for use in group:
            total = record.merge(total, uses[use])
        return first, total
    sizes = tuple(first.shape[a.axis] if a.axis in first.embed else a.size for a in first.lead)
    total = {name: jnp.zeros((*sizes, *x.shape[len(sizes) :]), x.dtype) for name, x in uses[first].items()}
    for use in group:
        place = tuple(
            slice(a.offset, a.offset + a.step * (a.size - 1) + 1, a.step) if a.axis in use.embed else slice(None)
            for a in use.lead
        )
        for name, x in uses[use].items():
            at = total[name].at[place]
            total[name] = at.max(x) if name in record.LARGEST else at.add(x)
    return first, total


def _stats(totals: list[tuple[Use, record.Moments]]) -> Stats:
    """The statistics of one parameter from those of each way in which it is used."""
    lookups = [(use, m) for use, m in totals if "counts" in m]
    products = [_stats_of(use, m) for use, m in totals if "counts" not in m]
    first = products[0] if products else Stats(axes=_axes(lookups[0][0]))
    counts = lookups[0][1]["counts"] if lookups else None
    return dataclasses.replace(first, counts=counts, others=tuple(products[1:]))


def _axes(use: Use) -> tuple[int, ...]:
    return tuple(axis - len(use.shape) for axis in use.axes)


def _stats_of(use: Use, moments: record.Moments) -> Stats:
    # Runs of one axis that lead (as where heads were split off it) are one axis again.
    axes = dict.fromkeys(a.axis for a in use.lead)
    n = len(use.lead)

    def joined(x: jax.Array) -> jax.Array:
        sizes = [1] * len(axes)
        for i, axis in enumerate(axes):
            for a, size in zip(use.lead, x.shape[:n], strict=True):
                sizes[i] *= size if a.axis == axis else 1
        return x.reshape(*sizes, *x.shape[n:])

    whole_moments = {name: joined(x) for name, x in moments.items()}
    outputs = {name.removeprefix("output_"): x for name, x in whole_moments.items() if name.startswith("output_")}
    fields: dict[str, Any] = {name: x for name, x in whole_moments.items() if not name.startswith("output_")}
    return Stats(**fields, outputs=Outputs(**outputs) if outputs else None, axes=_axes(use))


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
