"""Nodes in GGUF files: their codes as they are, in the blocks that llama.cpp multiplies by."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Layout, PyTree
from jcompress.io import blocks
from jcompress.io.codes import Codes, codes_of, dense_of, named
from jcompress.io.gguf import write_blocks
from jcompress.io.manifest import StorageError

_CAN = (
    "GGUF holds codes of 2 to 5 bits and symmetric ones of 8, in groups of a multiple of 32 inputs (Q4_0, Q4_1, Q5_0, "
    "Q5_1, Q8_0)"
)


def export_gguf(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    metadata: Mapping[str, Any] | None = None,
    layout: Layout | Mapping[str, Layout] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> int:
    """Write a tree to a GGUF file that llama.cpp runs, the codes of its nodes as they are.

    Symmetric integers of up to 4 bits become Q4_0, of 5 Q5_0, of up to 8 Q8_0; affine ones of up to 4 bits Q4_1, of 5
    Q5_1. Scales are rounded to float16, which is what these blocks have, and zero points are folded into the block's
    minimum. Zeros of a mask around codes are codes of zero. Arrays stay what they are, unless ``kinds`` says otherwise.

    Args:
      path: the file. An existing one is replaced.
      tree: nodes and arrays under the names of GGUF, ``{"blk.0.attn_q.weight": node}``; nested names are joined by
        dots.
      metadata: as in :func:`jcompress.io.write_gguf`; of the original, ``read_gguf(original).metadata``.
      layout: what the axes of kernels are, for all or ``{pattern: Layout}``; (out, in) by default, as GGUF has them.
      kinds: ``{pattern: kind}`` of arrays that are not compressed: ``"F32"``, ``"F16"``, ``"BF16"``, or one that they
        are rounded to, ``"Q8_0"``, ``"Q4_0"``, ``"Q4_1"``, ``"Q4_K"``. The first that matches counts, for kernels.

    Returns:
      The number of bytes written.

    Raises:
      StorageError: for a node that GGUF cannot hold; the message names it, and what can be held. Nothing is written.

    Example:
      >>> import os, tempfile, jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"blk.0.ffn_up.weight": jax.random.normal(jax.random.key(0), (8, 64))}
      >>> out_in = {".*": jc.Layout(inputs=1, outputs=0)}
      >>> small = jc.compress(params, jc.plan(params, [(".*", jc.quantize.Int(bits=4, group_size=32))], out_in))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.gguf")
      ...     size = jc.io.export_gguf(path, small)
      ...     found = jc.io.read_gguf(path)
      ...     again = found["blk.0.ffn_up.weight"]
      >>> found.kinds, bool(abs(again - small["blk.0.ffn_up.weight"].materialize()).max() < 1e-3)
      ({'blk.0.ffn_up.weight': 'Q4_0'}, True)
    """
    leaves = named(tree, layout)
    about = {name: _about(name, leaf, kind, kinds or {}) for name, (leaf, kind) in leaves.items()}

    def data(name: str) -> np.ndarray:
        leaf, layout = leaves[name]
        if not core.is_node(leaf):
            return blocks.encode(dense_of(leaf, layout), about[name][0])
        return _packed(name, _codes(name, leaf, layout), about[name][0])

    return write_blocks(path, about, data, metadata or {})


def _about(name: str, leaf: Any, layout: Layout | None, kinds: Mapping[str, str]) -> tuple[str, tuple[int, ...]]:
    """Kind and shape of one array."""
    if core.is_node(leaf):
        codes = _codes(name, leaf, layout)
        return _kind_of(name, codes), codes.levels.shape
    x = jnp.dtype(leaf.dtype)
    shape = tuple(leaf.shape)
    if layout is not None and not layout.window:
        shape = (*layout.seen(shape)[:-2], layout.seen(shape)[-1], layout.seen(shape)[-2])
    plain = {jnp.dtype(dtype): kind for kind, dtype in blocks.PLAIN.items()}
    chosen = next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, name)), None)
    if chosen is None or len(shape) < 2:
        if x not in plain:
            raise StorageError(f"{name}: found dtype {x}, expected one of {', '.join(map(str, plain))}; cast it")
        return plain[x], shape
    known = ("F32", "F16", "BF16", *blocks.ENCODED)
    if chosen not in known:
        raise StorageError(f"{name}: found kind {chosen!r}, expected one of {', '.join(known)}")
    if shape[-1] % blocks.KINDS[chosen].block:
        raise StorageError(
            f"{name}: found {shape[-1]} inputs, and {chosen} has blocks of {blocks.KINDS[chosen].block}; choose "
            "another kind for it"
        )
    return chosen, shape


def _codes(name: str, leaf: Any, layout: Layout | None) -> Codes:
    found = codes_of(name, leaf, layout, _CAN)
    if not isinstance(found, Codes):
        raise StorageError(f"{name}: found {leaf!r}, and GGUF has no masks; materialize it, or quantize it besides")
    return found


def _kind_of(name: str, codes: Codes) -> str:
    """The smallest kind that holds the codes."""
    order = ("Q4_1", "Q5_1") if codes.zero is not None else ("Q4_0", "Q5_0", "Q8_0")
    low, high = (0, 0) if codes.is_float else (int(codes.levels.min(initial=0)), int(codes.levels.max(initial=0)))
    fitting = [kind for kind in order if blocks.RANGES[kind][0] <= low and high <= blocks.RANGES[kind][1]]
    fitting = [kind for kind in fitting if codes.bits <= int(kind[1])]
    if codes.is_float or codes.group_size % 32 or not fitting:
        raise StorageError(f"{name}: found {codes.told()}, and {_CAN}")
    return fitting[0]


def _packed(name: str, codes: Codes, kind: str) -> np.ndarray:
    times = codes.group_size // 32
    scale = np.repeat(codes.scale.astype(np.float32), times, axis=-1).reshape(-1)
    if float(np.abs(scale).max(initial=0)) > 65504:
        raise StorageError(f"{name}: found scales above 65504, and GGUF holds them as float16; divide the leaf")
    minimum, scale = None, scale.astype(np.float16)
    if codes.zero is not None:
        zero = np.repeat(codes.zero, times, axis=-1).reshape(-1)
        minimum = (-scale.astype(np.float32) * zero).astype(np.float16)
    return blocks.pack(kind, codes.levels.reshape(-1, 32), scale, minimum).reshape(-1)
