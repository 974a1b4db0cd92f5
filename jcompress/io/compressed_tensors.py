"""Nodes in safetensors files under the names that the package compressed-tensors gives them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Layout, PyTree
from jcompress.io import files
from jcompress.io.codes import Codes, codes_of, dense_of, named
from jcompress.io.manifest import StorageError
from jcompress.io.safetensors import write_safetensors

_CAN = (
    "compressed-tensors holds integer codes of 2 to 8 bits and float8_e4m3fn ones, a scale for each output, group of "
    "inputs or array, and masks that keep 2 of 4 inputs"
)


def export_compressed_tensors(
    folder: str | os.PathLike[str],
    tree: PyTree,
    *,
    layout: Layout | Mapping[str, Layout] | None = None,
    config: Mapping[str, Any] | None = None,
) -> int:
    """Write a tree as ``model.safetensors`` and ``config.json`` in the naming of compressed-tensors, which vLLM reads.

    Of ``X.weight``, 8-bit integers become ``X.weight`` and ``X.weight_scale`` (int-quantized), fewer bits
    ``X.weight_packed``, 32 bits a word, with ``X.weight_shape`` (pack-quantized), float8 ``X.weight`` and
    ``X.weight_scale`` (float-quantized), and floats of which 2 of 4 inputs are kept ``X.compressed`` and ``X.bitmask``
    (sparse-24-bitmask). Zero points are ``X.weight_zero_point``. All else is written as it is.

    Args:
      folder: made if it does not exist; files of these names are replaced.
      tree: nodes and arrays under the names of the model, ``{"model.layers.0.mlp.up_proj.weight": node}``; nested names
        are joined by dots.
      layout: what the axes of kernels are, for all or ``{pattern: Layout}``; (out, in) by default, as PyTorch has them.
      config: the model's own ``config.json``, to which what was done is added.

    Returns:
      The number of bytes written.

    Raises:
      StorageError: for a node that the naming does not have; the message names it, and what can be held. Nothing is
        written then.

    Example:
      >>> import tempfile, jax.numpy as jnp, jcompress as jc
      >>> params = {"up.weight": jnp.ones((8, 64)), "norm.weight": jnp.ones(64)}
      >>> out_in = {"up.weight": jc.Layout(inputs=1, outputs=0)}
      >>> small = jc.compress(params, jc.plan(params, [("up.*", jc.quantize.Int(bits=4, group_size=32))], out_in))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     size = jc.io.export_compressed_tensors(folder, small)
      ...     found = jc.io.read_safetensors(folder)
      >>> sorted((name, x.shape) for name, x in found.shapes.items())  # doctest: +NORMALIZE_WHITESPACE
      [('norm.weight', (64,)), ('up.weight_packed', (8, 8)), ('up.weight_scale', (8, 2)), ('up.weight_shape', (2,))]
    """
    arrays: dict[str, Any] = {}
    schemes: dict[str, dict[str, Any]] = {}
    sparse: list[str] = []
    dense: list[str] = []
    for name, (leaf, kind) in named(tree, layout).items():
        if not core.is_node(leaf):
            arrays[name] = dense_of(leaf, kind)
            dense += [_module(name)] * (arrays[name].ndim > 1)
            continue
        found = codes_of(name, leaf, kind, _CAN)
        if isinstance(found, Codes):
            schemes[_module(name)] = _scheme(name, found)
            arrays |= _quantized(_module(name), found)
        else:
            arrays |= _two_of_four(name, *found)
            sparse.append(_module(name))
    about = {**(config or {}), "quantization_config": _config(schemes, sparse, dense)}
    folder = os.fspath(folder)
    with files.told(folder, "writing"):
        os.makedirs(folder, exist_ok=True)
    size = write_safetensors(os.path.join(folder, "model.safetensors"), arrays, metadata={"format": "pt"})
    text = json.dumps(about, indent=2).encode()
    return size + files.replace(os.path.join(folder, "config.json"), lambda file: file.write(text))


def _module(name: str) -> str:
    if not name.endswith(".weight"):
        if name.count(".") == 0:
            raise StorageError(f"{name}: expected the name of a module's weight, such as layers.0.up.weight; rename it")
        return name.rpartition(".")[0]
    return name.removesuffix(".weight")


def _scheme(name: str, codes: Codes) -> dict[str, Any]:
    """How the configuration describes a grid, and the format that holds it."""
    if not name.endswith(".weight"):
        raise StorageError(f"{name}: expected the name of a module's weight, such as layers.0.up.weight; rename it")
    if codes.levels.ndim != 2 or codes.bits > 8 or (codes.is_float and codes.levels.dtype != jnp.float8_e4m3fn):
        raise StorageError(f"{name}: found {codes.told()}, and {_CAN}")
    if codes.zero is not None and (codes.zero != np.round(codes.zero)).any():
        raise StorageError(f"{name}: found zero points that are no codes, and {_CAN}; fit it without HQQ's fractions")
    groups = codes.scale.shape[-1]
    strategy = "group" if groups > 1 else "tensor" if codes.shared else "channel"
    form = "float-quantized" if codes.is_float else "int-quantized" if codes.bits == 8 else "pack-quantized"
    weights = {
        "num_bits": codes.bits,
        "type": "float" if codes.is_float else "int",
        "symmetric": codes.zero is None,
        "strategy": strategy,
        **({"group_size": codes.group_size} if groups > 1 else {}),
    }
    return {"format": form, "weights": weights}


def _quantized(module: str, codes: Codes) -> dict[str, np.ndarray]:
    scale = codes.scale[:1, :1].reshape(1) if codes.shared and codes.scale.shape[-1] == 1 else codes.scale
    half = 1 << codes.bits >> 1
    if codes.is_float:
        return {f"{module}.weight": codes.levels, f"{module}.weight_scale": scale}
    # Both kinds count from the middle of the range.
    levels = codes.levels if codes.zero is None else codes.levels - half
    found: dict[str, np.ndarray] = {f"{module}.weight_scale": scale}
    if codes.zero is not None:
        zero = codes.zero.astype(np.int32) - half
        found[f"{module}.weight_zero_point"] = zero.astype(np.int8) if codes.bits == 8 else _words(zero.T, codes.bits).T
    if codes.bits == 8:
        return {f"{module}.weight": levels.astype(np.int8), **found}
    shape = np.array(levels.shape, np.int64)
    return {f"{module}.weight_packed": _words(levels, codes.bits), f"{module}.weight_shape": shape, **found}


def _words(levels: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes counted from 0, without gaps in words of 32 bits."""
    codes = (levels + (1 << bits >> 1)).astype(np.uint8)
    flat = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(codes.shape[0], -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=-1, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)


def _two_of_four(name: str, values: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    rows, inputs = values.shape[-2:]
    kept = mask.reshape(-1, 4).sum(-1) if inputs % 4 == 0 else np.zeros(1)
    if values.ndim != 2 or not name.endswith(".weight") or (kept != 2).any():
        raise StorageError(f"{name}: found a mask that does not keep 2 of each 4 inputs, and {_CAN}; materialize it")
    module = _module(name)
    return {
        f"{module}.compressed": values[mask].reshape(rows, inputs // 2),
        f"{module}.bitmask": np.packbits(mask, axis=-1, bitorder="little"),
        f"{module}.shape": np.array([[rows], [inputs]], np.int64),
    }


def _config(schemes: Mapping[str, Any], sparse: list[str], dense: list[str]) -> dict[str, Any]:
    """Modules of one scheme are a group of the configuration."""
    groups: dict[str, Any] = {}
    for module, scheme in schemes.items():
        key = json.dumps(scheme, sort_keys=True)
        groups.setdefault(key, {"targets": [], **scheme, "input_activations": None})["targets"].append(module)
    formats = sorted({group["format"] for group in groups.values()})
    about: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "dense" if not formats else formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": sorted(set(dense)),
    }
    if sparse:
        about["sparsity_config"] = {
            "format": "sparse-24-bitmask",
            "sparsity_structure": "2:4",
            "global_sparsity": 0.5,
            "targets": sparse,
            "ignore": sorted({*dense, *schemes}),
        }
    return about
