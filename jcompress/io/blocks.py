"""How GGUF keeps numbers: blocks of a row that share scales, as bytes, and the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Kind(NamedTuple):
    """One way to keep numbers.

    Attributes:
      number: what stands for it in files.
      block: numbers a block.
      nbytes: bytes a block.
    """

    number: int
    block: int
    nbytes: int


PLAIN = {
    "F32": "float32",
    "F16": "float16",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F64": "float64",
    "BF16": "bfloat16",
}
"""Kinds that are arrays of a dtype."""

KINDS = {
    "F32": Kind(0, 1, 4),
    "F16": Kind(1, 1, 2),
    "Q4_0": Kind(2, 32, 18),
    "Q4_1": Kind(3, 32, 20),
    "Q5_0": Kind(6, 32, 22),
    "Q5_1": Kind(7, 32, 24),
    "Q8_0": Kind(8, 32, 34),
    "Q8_1": Kind(9, 32, 40),
    "Q2_K": Kind(10, 256, 84),
    "Q3_K": Kind(11, 256, 110),
    "Q4_K": Kind(12, 256, 144),
    "Q5_K": Kind(13, 256, 176),
    "Q6_K": Kind(14, 256, 210),
    "Q8_K": Kind(15, 256, 292),
    "IQ2_XXS": Kind(16, 256, 66),
    "IQ2_XS": Kind(17, 256, 74),
    "IQ3_XXS": Kind(18, 256, 98),
    "IQ1_S": Kind(19, 256, 50),
    "IQ4_NL": Kind(20, 32, 18),
    "IQ3_S": Kind(21, 256, 110),
    "IQ2_S": Kind(22, 256, 82),
    "IQ4_XS": Kind(23, 256, 136),
    "I8": Kind(24, 1, 1),
    "I16": Kind(25, 1, 2),
    "I32": Kind(26, 1, 4),
    "I64": Kind(27, 1, 8),
    "F64": Kind(28, 1, 8),
    "IQ1_M": Kind(29, 256, 56),
    "BF16": Kind(30, 1, 2),
    "TQ1_0": Kind(34, 256, 54),
    "TQ2_0": Kind(35, 256, 66),
    "MXFP4": Kind(39, 32, 17),
}


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """The numbers that the bytes of whole blocks stand for: float32, and of a plain kind its own dtype.

    Args:
      data: uint8, (bytes,).
      kind: one of ``PLAIN`` or ``DECODED``.
    """
    if kind in PLAIN:
        return data.view(np.dtype(jnp.dtype(PLAIN[kind])))
    with np.errstate(invalid="ignore"):  # a damaged file may hold scales that are infinite
        return DECODED[kind](data.reshape(-1, KINDS[kind].nbytes)).reshape(-1)


def _halves(x: np.ndarray) -> np.ndarray:
    """Two bytes a row as a float16, widened."""
    return np.ascontiguousarray(x).view(np.float16).astype(np.float32)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """The low halves of all bytes, then the high ones."""
    return np.concatenate([x & 15, x >> 4], axis=-1)


def _fifth_bits(x: np.ndarray) -> np.ndarray:
    """Bit i of 32 in the fifth place of number i."""
    return np.unpackbits(x, axis=-1, bitorder="little") << 4


def _q4_0(x: np.ndarray) -> np.ndarray:
    return _halves(x[:, :2]) * (_nibbles(x[:, 2:]).astype(np.float32) - 8)


def _q4_1(x: np.ndarray) -> np.ndarray:
    return _halves(x[:, :2]) * _nibbles(x[:, 4:]).astype(np.float32) + _halves(x[:, 2:4])


def _q5_0(x: np.ndarray) -> np.ndarray:
    codes = _nibbles(x[:, 6:]) | _fifth_bits(x[:, 2:6])
    return _halves(x[:, :2]) * (codes.astype(np.float32) - 16)


def _q5_1(x: np.ndarray) -> np.ndarray:
    codes = _nibbles(x[:, 8:]) | _fifth_bits(x[:, 4:8])
    return _halves(x[:, :2]) * codes.astype(np.float32) + _halves(x[:, 2:4])


def _q8_0(x: np.ndarray) -> np.ndarray:
    return _halves(x[:, :2]) * np.ascontiguousarray(x[:, 2:]).view(np.int8).astype(np.float32)


def _six_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits in 12 bytes: four of each below, the others' high bits above those."""
    low, middle, high = x[:, :4], x[:, 4:8], x[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _affine_256(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    scales, minima = _six_bits(x[:, 4:16])
    scales, minima = _halves(x[:, :2]) * scales, _halves(x[:, 2:4]) * minima
    return scales[..., None] * codes.astype(np.float32) - minima[..., None]


def _q4_k(x: np.ndarray) -> np.ndarray:
    return _affine_256(x, _nibbles(x[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(x: np.ndarray) -> np.ndarray:
    codes = _nibbles(x[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = (x[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _affine_256(x, codes | fifth << 4)


def _q6_k(x: np.ndarray) -> np.ndarray:
    low = _nibbles(x[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    pairs = (x[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | pairs.reshape(-1, 8, 32) << 4).astype(np.float32) - 32
    scales = np.ascontiguousarray(x[:, 192:208]).view(np.int8).astype(np.float32)
    scales = _halves(x[:, 208:]) * scales
    return scales[..., None] * codes.reshape(-1, 16, 16)


DECODED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Kinds of blocks whose numbers are known here."""


def _bytes(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(x).view(np.uint8) for x in parts], axis=-1)


def _pairs(codes: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_nibbles`."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] | codes[..., half:] << 4).astype(np.uint8)


def pack(kind: str, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None = None) -> np.ndarray:
    """Blocks of 32 codes that are known, as bytes.

    Args:
      kind: ``"Q8_0"``, ``"Q4_0"``, ``"Q4_1"``, ``"Q5_0"`` or ``"Q5_1"``.
      codes: (blocks, 32); of the symmetric kinds signed, of the others from 0.
      scale: (blocks,), float16.
      minimum: (blocks,), float16, of the affine kinds.
    """
    scale = scale[:, None].astype(np.float16)
    if kind == "Q8_0":
        return _bytes(scale, codes.astype(np.int8))
    head = (scale,) if minimum is None else (scale, minimum[:, None].astype(np.float16))
    codes = (codes + {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)).astype(np.uint8)
    if kind in ("Q5_0", "Q5_1"):
        head = (*head, np.packbits(codes >> 4 & 1, axis=-1, bitorder="little"))
    return _bytes(*head, _pairs(codes & 15))


RANGES = {"Q8_0": (-128, 127), "Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q4_1": (0, 15), "Q5_1": (0, 31)}
"""The codes that kinds of 32 hold."""
AFFINE = ("Q4_1", "Q5_1")


def encode(x: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of numbers rounded to a kind: by the largest magnitude of a block, or its least and greatest.

    Args:
      x: floating, its last axis a multiple of the block.
      kind: ``"Q8_0"``, ``"Q4_0"``, ``"Q4_1"``, ``"Q4_K"``, or a plain one.
    """
    if kind in PLAIN:
        return np.ascontiguousarray(x, np.dtype(jnp.dtype(PLAIN[kind]))).reshape(-1).view(np.uint8)
    x = np.asarray(x, np.float32).reshape(-1, KINDS[kind].block)
    return ENCODED[kind](x).reshape(-1)


def _over(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Quotients, zero where the scale is."""
    return x * np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _to_q8_0(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return pack("Q8_0", np.round(_over(x, scale)), scale[:, 0])


def _to_q4_0(x: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    scale = largest / -8
    return pack("Q4_0", np.clip(np.floor(_over(x, scale) + 0.5), -8, 7), scale[:, 0])


def _to_q4_1(x: np.ndarray) -> np.ndarray:
    least = x.min(-1, keepdims=True)
    scale = (x.max(-1, keepdims=True) - least) / 15
    return pack("Q4_1", np.clip(np.floor(_over(x - least, scale) + 0.5), 0, 15), scale[:, 0], least[:, 0])


def _to_q4_k(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 8, 32)
    minima = -np.minimum(x.min(-1), 0)
    scales = (x.max(-1) + minima) / 15
    wide = [(np.maximum(y.max(-1, keepdims=True), 0) / 63).astype(np.float16) for y in (scales, minima)]
    few = [
        np.clip(np.round(_over(y, z.astype(np.float32))), 0, 63) for y, z in zip((scales, minima), wide, strict=True)
    ]
    scale, least = (y * z.astype(np.float32) for y, z in zip(few, wide, strict=True))
    codes = np.clip(np.round(_over(x + least[..., None], scale[..., None])), 0, 15).astype(np.uint8)
    s, m = (y.astype(np.uint8) for y in few)
    packed = _bytes(s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4)
    return _bytes(*wide, packed, _pairs(codes.reshape(-1, 4, 64)).reshape(-1, 128))


ENCODED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
    "Q4_1": _to_q4_1,
    "Q4_K": _to_q4_k,
}
"""Kinds of blocks that numbers are rounded to here."""
