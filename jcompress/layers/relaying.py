"""A leaf and all that is known of it, in the order of axes in which methods see them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Layout
from jcompress.formats.arranged import arranged

_PER_FEATURE = ("sum", "square", "absmax", "zeros", "counts")
_OF_LEAF = ("grad", "grad_square", "hessian_diagonal")


def layout_of(shape: tuple[int, ...], stats: Any) -> Layout | None:
    """The layout that statistics know: their own, or else what follows from their axes and shapes."""
    axes = getattr(stats, "axes", ())
    if not axes or (known := getattr(stats, "layout", None)) is not None:
        return known if axes else None
    axes = tuple(sorted(a if a < 0 else a - len(shape) for a in axes))
    lead, rest = _lead(stats), [a for a in range(-len(shape), 0) if a not in axes]
    stacked = [a for a in rest if a < axes[0]][: len(lead)]
    if tuple(shape[a] for a in stacked) != lead:  # the groups of a convolution
        is_split = len(lead) == 1 and rest == [-1] and shape[-1] % lead[0] == 0
        return Layout(window=axes[:-1], inputs=axes[-1], outputs=-1, groups=lead[0]) if is_split else None
    outputs = tuple(a for a in rest if a not in stacked)
    is_plain = outputs == (-1,) and axes == tuple(range(-len(axes) - 1, -1))
    window = axes[:-1] if is_plain else ()
    return Layout(batch=tuple(stacked), window=window, inputs=axes[len(window) :], outputs=outputs) if outputs else None


def _lead(stats: Any) -> tuple[int, ...]:
    """The leading axes of statistics."""
    for name, own in (("gram", 2), *((name, 1) for name in _PER_FEATURE), ("count", 0)):
        if (x := getattr(stats, name, None)) is not None:
            return tuple(jnp.shape(x)[: jnp.ndim(x) - own])
    return ()


def seen(w: jax.Array, context: Context, layout: Layout) -> tuple[jax.Array, Context]:
    """The leaf and its context as methods see them, ``context.batch`` axes in front."""
    sizes = tuple(w.shape[w.ndim - layout.ndim :])
    known: dict[str, Any] = {"batch": layout.lead(w.ndim)}
    if layout.plain:
        return w, dataclasses.replace(context, **known)
    for name in ("grad", "where"):
        if (x := getattr(context, name)) is not None:
            known[name] = layout.arrange(jnp.broadcast_to(x, w.shape))
    known["previous"] = arranged(context.previous, layout, sizes)
    if context.stats is not None and context.stats.axes:
        known["stats"] = _relaid(context.stats, layout, w.shape)
    return layout.arrange(w), dataclasses.replace(context, **known)


def _relaid(stats: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """Statistics of the leaf as methods see it: their features in the order of its contracted axes."""
    kept = (*layout.window, *layout.inputs)
    order = _order(kept, shape)
    found: dict[str, Any] = {"others": (), "axes": tuple(range(-2 - len(layout.window), -1))}
    for name in _PER_FEATURE:
        if (x := getattr(stats, name)) is not None:
            found[name] = x if order is None else x[..., order]
    if stats.gram is not None:
        found["gram"] = stats.gram if order is None else stats.gram[..., order, :][..., order]
    for name in _OF_LEAF:
        if (x := getattr(stats, name)) is not None:
            found[name] = layout.arrange(x)
    if stats.outputs is not None and (turn := _order(layout.outputs, shape)) is not None:
        found["outputs"] = jax.tree.map(lambda x: x[..., turn], stats.outputs)
    if hasattr(stats, "layout"):
        found["layout"] = None
    return dataclasses.replace(stats, **found)


def _order(axes: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray | None:
    """Where the entries of axes in this order stand among those of the axes as they rise; None if they do already."""
    rising = tuple(sorted(axes))
    if rising == axes:
        return None
    places = np.arange(math.prod(shape[a] for a in rising)).reshape([shape[a] for a in rising])
    return places.transpose([rising.index(a) for a in axes]).ravel()
