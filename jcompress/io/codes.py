"""What other formats can hold of a node: codes on a grid with scales, and a mask, as (outputs, inputs)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import Layout, PyTree
from jcompress.formats import Cast, Masked, Quantized
from jcompress.formats.arranged import Arranged, arranged
from jcompress.io.manifest import StorageError

OUT_IN = Layout(inputs=1, outputs=0)


@dataclasses.dataclass(frozen=True)
class Codes:
    """A kernel on a grid: ``scale * (levels - zero)``, zero where the mask hides it.

    Attributes:
      levels: (..., outputs, inputs), int32, or an 8-bit float; where there is a zero point, codes from 0.
      scale: (..., outputs, groups), floating.
      zero: float32 in the shape of ``scale``, or None.
      bits: of a code.
      group_size: inputs a scale; all of them without groups.
      shared: whether one scale is that of all outputs.
      mask: bool, (..., outputs, inputs), or None.
    """

    levels: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int
    group_size: int
    shared: bool
    mask: np.ndarray | None

    @property
    def is_float(self) -> bool:
        """Whether the codes are narrow floats."""
        return jnp.issubdtype(self.levels.dtype, jnp.floating)

    def told(self) -> str:
        """The grid in words."""
        kind = (
            f"{self.levels.dtype}" if self.is_float else f"{self.bits}-bit {'affine' if self.zero is not None else ''}"
        )
        return f"{kind.strip()} codes in groups of {self.group_size} of {self.levels.shape[-1]} inputs"


def named(tree: PyTree, layout: Any) -> dict[str, tuple[Any, Layout | None]]:
    """The leaves by name, with the layouts that are given by pattern, or one for all kernels; (out, in) by default.

    Names of nested trees are joined by dots, as those formats have them.
    """
    found: dict[str, tuple[Any, Layout | None]] = {}
    for path, leaf in rules.paths(core.untie(tree)):
        if not hasattr(leaf, "shape"):
            continue
        name = path.replace("/", ".")
        if name in found:
            raise StorageError(f"{path}: found two leaves of the name {name}; rename one")
        leaf = _uncast(leaf)
        found[name] = leaf, _layout(path, leaf, layout)
    return found


def _uncast(leaf: Any) -> Any:
    """What is kept in another float dtype, as an array of that."""
    node = leaf.opened() if core.is_node(leaf) else leaf
    inner = node.inner if isinstance(node, Arranged) else node
    if not isinstance(inner, Cast) or core.is_node(inner.values):
        return leaf
    return node.layout.restore(inner.values, node.sizes) if isinstance(node, Arranged) else inner.values


def _layout(path: str, leaf: Any, layout: Any) -> Layout | None:
    if len(leaf.shape) < 2:
        return None
    if isinstance(layout, Mapping):
        layout = next((x for pattern, x in layout.items() if re.fullmatch(pattern, path)), None)
    layout = OUT_IN if layout is None else layout
    layout.check(path, leaf.shape)
    return layout


def dense_of(leaf: Any, layout: Layout | None) -> np.ndarray:
    """An array as (..., outputs, inputs); what is no kernel, or has a window, as it is."""
    x = np.asarray(leaf)
    if layout is None or layout.window or x.ndim < 2:
        return x
    return x if layout == OUT_IN else np.swapaxes(np.asarray(layout.arrange(x)), -1, -2)


def codes_of(path: str, leaf: Any, layout: Layout | None, can: str) -> Codes | tuple[np.ndarray, np.ndarray]:
    """The codes of a node, or values and mask of one that has no codes.

    Raises:
      StorageError: for any other node; the message says what the target can hold.
    """
    node = leaf.opened()
    if isinstance(node, Arranged):
        inner: Any = node.inner
    else:
        layout = layout or OUT_IN
        inner = arranged(node, layout, tuple(node.shape[len(node.shape) - layout.ndim :]))
    if not core.is_node(inner):  # its parts cannot be laid out; what it stands for still can
        inner = node
    mask = None
    if isinstance(inner, Masked):
        mask = np.swapaxes(np.broadcast_to(np.asarray(inner.mask), inner.shape), -1, -2)
        if not core.is_node(inner.values):
            return np.where(mask, np.swapaxes(np.asarray(inner.values), -1, -2), 0), mask
        inner = inner.values
    if not isinstance(inner, Quantized) or inner.table is not None or isinstance(inner.group_size, tuple):
        raise StorageError(f"{path}: found {leaf!r}, and {can}; materialize it, or compress it otherwise")
    return _codes(path, inner, mask, can)


def _codes(path: str, node: Quantized, mask: np.ndarray | None, can: str) -> Codes:
    """Those of a node that is laid out as methods see it."""
    stored, scale = np.asarray(core.dense(node.codes)), np.asarray(core.dense(node.scale))
    zero = None if node.zero is None else np.asarray(core.dense(node.zero)).astype(np.float32)
    inputs, outputs = stored.shape[-2:]
    size = inputs if node.group_size is None else int(node.group_size)  # type: ignore[arg-type]
    groups = -(-inputs // size)
    if scale.shape[-2] not in (1, groups) or (groups > 1 and inputs % size) or node.group_axis != -2:
        raise StorageError(f"{path}: found scales of shape {scale.shape} for {inputs} inputs, and {can}")
    shared = scale.shape[-1] == 1 and outputs > 1
    shape = (*stored.shape[:-2], groups, outputs)
    scale = np.swapaxes(np.broadcast_to(scale, shape), -1, -2)
    levels = np.swapaxes(stored, -1, -2)
    if zero is not None:
        zero = np.swapaxes(np.broadcast_to(zero, shape), -1, -2)
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        levels = levels.astype(np.int32)
        levels = 2 * levels + 1 if node.bits == 1 and zero is None else levels
    if mask is not None:
        levels = _hidden(path, levels, zero, mask, size)
    return Codes(levels, scale, zero, max(node.bits, 2), size, shared, mask)


def _hidden(path: str, levels: np.ndarray, zero: np.ndarray | None, mask: np.ndarray, size: int) -> np.ndarray:
    """The codes with those of zero where the mask hides them."""
    if zero is None:
        return np.where(mask, levels, np.zeros((), levels.dtype))
    if (zero != np.round(zero)).any():
        raise StorageError(f"{path}: found zero points that are no codes below a mask, expected whole ones")
    return np.where(mask, levels, np.repeat(zero, size, axis=-1).astype(levels.dtype))
