"""One pass of data through any function, with what meets each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.trace.core import flow, walk
from jcompress.trace.recording import record, tape
from jcompress.trace.recording.meetings import Use
from jcompress.trace.recording.sites import Sites
from jcompress.trace.recording.statistics import DEFAULT, FORWARD, OF_LOSS, Calibration, Outputs, Stats


def observe(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    statistics: Any = DEFAULT,
    largest: int | None = None,
    where: Any = None,
) -> tuple[Any, Calibration]:
    """Run ``fn(params, *args)``, and gather what each parameter meets.

    Pure: works under ``jit``, ``vmap`` over arguments, and sharding, and the outputs are those of ``fn``. The
    function is traced and run equation by equation. A parameter is followed through changes of layout (transpose,
    reshape, slice, cast, loops) to the products and lookups in which it meets an activation. Derivatives of the
    outputs are those of the equations: a custom rule around a parameter is taken in, and lost.

    Uses that contract the same axes are summed, parts of the outputs that read one activation count once, a loop
    sums over its iterations, and ``cond`` counts the branch that was taken.

    Args:
      fn: any JAX function.
      params: a pytree of arrays.
      *args: the other arguments of ``fn``. With none, what ``fn`` closes over counts as activations.
      statistics: names of fields of :class:`Stats`, for all parameters; or ``{path: names}``.
      largest: leave out Gram matrices of more features than this.
      where: which positions count (booleans), or how much each does (weights, not negative), by the leading axes of the
        arguments: (batch,), or (batch, time). Positions are followed through the function: what is computed entry by
        entry, laid out anew, convolved at as many positions or looked up stands where its operands do, and a sum over
        positions, such as a pooled vector, counts if one of them does. Or weights by path, of each parameter's
        products, as :func:`jcompress.trace.position_weights` gives them; other parameters count all positions alike.

    Returns:
      ``(outputs, calibration)``, the latter a :class:`Calibration`: a mapping from paths to :class:`Stats`, with
      ``.unread`` for those whose products give none, such as a kernel that was normalised first.

    Raises:
      ValueError: for an unknown statistic, a compressed node among the parameters, or if the shape of ``where`` is that
        of no argument's leading axes.

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
    by_path = isinstance(where, Mapping)
    mask = None if where is None or by_path else _mask(where, jax.tree.leaves(args))
    sites = _sites(where, program.paths) if by_path else None
    found = tape.Found({path: _moments(path, names) for path, names in wanted.items()}, largest, mask, sites)
    recorded = tape.Tape(found)
    body = flow.of_program(program, set(found.wanted), None if mask is None else mask.shape)
    outs = record.evaluate(body, values, recorded)
    uses = recorded.close()
    return jax.tree.unflatten(program.out_tree, outs), _collected(uses, found, program)


def _sites(where: Mapping[str, Any], paths: Iterable[str]) -> Sites:
    """Weights by path, each as a list of arrays."""
    if unknown := sorted(set(where) - set(paths)):
        raise ValueError(f"where: found weights of {unknown[0]!r}, which is no parameter; there are {', '.join(paths)}")
    listed = {path: w if isinstance(w, (list, tuple)) else [w] for path, w in where.items()}
    return Sites({path: [jnp.asarray(w, jnp.float32) for w in ws] for path, ws in listed.items()})


def _mask(where: Any, args: list[Any]) -> jax.Array:
    """A mask or weights, as booleans, integers or float32."""
    mask = jnp.asarray(where)
    mask = mask.astype(jnp.float32) if jnp.issubdtype(mask.dtype, jnp.floating) else mask
    shapes = [jnp.shape(x) for x in args]
    if not mask.ndim or all(shape[: mask.ndim] != mask.shape for shape in shapes):
        raise ValueError(
            f"where: found shape {mask.shape}, expected that of the leading axes of an argument; the arguments have "
            f"shapes {', '.join(map(str, shapes)) or 'none'}"
        )
    return mask


def _moments(path: str, names: Iterable[str]) -> frozenset[str]:
    names = frozenset(names)
    if unknown := sorted(names - {*FORWARD, *OF_LOSS, "square"}):
        raise ValueError(f"{path}: unknown statistic {unknown[0]!r}; there are {', '.join((*FORWARD, *OF_LOSS))}")
    return frozenset("square" if name == "norm" else name for name in names - set(OF_LOSS))


def _collected(uses: Mapping[Use, tape.Moments], found: tape.Found, program: walk.Program) -> Calibration:
    """Uses as statistics by path, in the order of the parameters."""
    by_path: dict[str, dict[Any, list[Use]]] = {path: {} for path in program.paths}
    for use in uses:
        if use.path not in found.unread and found.wanted.get(use.path):
            by_path[use.path].setdefault(_kind_of(use, uses[use]), []).append(use)
    stats = {
        path: _stats([_total(group, uses) for group in groups.values()], found)
        for path, groups in by_path.items()
        if groups
    }
    for path, var in zip(program.paths, program.closed.jaxpr.invars, strict=False):
        if path in stats and not jnp.issubdtype(walk.aval(var).dtype, jnp.complexfloating):
            stats[path] = _of_real(stats[path])
    used = {v for eqn in walk.equations(program.closed.jaxpr) for v in eqn.invars if not hasattr(v, "val")}
    used |= {v for v in program.closed.jaxpr.outvars if not hasattr(v, "val")}
    notes = dict(found.notes)
    for path, var in zip(program.paths, program.closed.jaxpr.invars, strict=False):
        if var not in used:
            notes[path] = "not used"
        elif path not in stats and path not in found.unread and path not in found.met:
            notes[path] = "in no product with an activation"
    return Calibration(stats, found.unread, notes, found.levels)


def _of_real(stats: Stats) -> Stats:
    """The statistics of a real parameter, whose changes move outputs by the real part of a Gram matrix."""
    gram = None if stats.gram is None else jnp.real(stats.gram)
    return dataclasses.replace(stats, gram=gram, others=tuple(map(_of_real, stats.others)))


def _kind_of(use: Use, moments: tape.Moments) -> Any:
    """What uses have in common whose moments add up, once layers used one by one stand at their places."""
    lead = tuple((a.axis, 1, use.shape[a.axis]) if a.axis in use.embed else (a.axis, a.step, a.size) for a in use.lead)
    return "counts" in moments, use.axes, lead


def _total(group: list[Use], uses: Mapping[Use, tape.Moments]) -> tuple[Use, tape.Moments]:
    """The moments of uses that differ at most in which layers they are of."""
    first, total = group[0], dict[str, jax.Array]()
    if not first.embed:
        for use in group:
            total = tape.merge(total, uses[use])
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
            total[name] = at.max(x) if name in tape.LARGEST else at.add(x)
    return first, total


def _stats(totals: list[tuple[Use, tape.Moments]], found: tape.Found) -> Stats:
    """The statistics of one parameter from those of each way in which it is used."""
    lookups = [(use, m) for use, m in totals if "counts" in m]
    products = [_stats_of(use, m, found) for use, m in totals if "counts" not in m]
    first = products[0] if products else _stats_of(lookups[0][0], {}, found)
    counts = lookups[0][1]["counts"] if lookups else None
    return dataclasses.replace(first, counts=counts, others=tuple(products[1:]))


def _axes(use: Use) -> tuple[int, ...]:
    return tuple(axis - len(use.shape) for axis in use.axes)


def _stats_of(use: Use, moments: tape.Moments, found: tape.Found) -> Stats:
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
    layout = found.layouts.get((use.path, use.axes))
    return Stats(**fields, outputs=Outputs(**outputs) if outputs else None, axes=_axes(use), layout=layout)
