"""Numbers as tokens, which a table of frequencies codes, and bits that are stored as they are.

Three ways, each exact: *direct*, an integer less the smallest one; *log*, the number of its bits and the first two
after the leading one, the rest raw; *exponent*, that of a float, its sign and mantissa raw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jcompress.numeric import packing
from jcompress.numeric.headers import HeaderReader, HeaderWriter
from jcompress.numeric.tables import MOST_SYMBOLS

CHUNK = 1 << 17
_SMALL, _MANY = 16, 1 << 10
DIRECT, LOG, EXPONENT = range(3)


@dataclasses.dataclass(frozen=True)
class Split:
    """How the numbers of one array become tokens.

    Attributes:
      kind: ``DIRECT``, ``LOG`` or ``EXPONENT``.
      symbols: how many tokens there are.
      low: the smallest number, or the smallest exponent, as an unsigned integer of 64 bits.
      zeros: of floats, the low bits of the mantissa that are 0 in all.
      bare: whether numbers of exponent 0 are all +0, so that nothing is stored beside the token.
    """

    kind: int
    symbols: int
    low: int
    zeros: int = 0
    bare: bool = False

    def write(self, header: HeaderWriter) -> None:
        """Append what :func:`read_split` reads."""
        header.number(self.kind, 2)
        header.golomb(self.symbols - 1, 3)
        negative = self.low >> 63
        header.number(negative, 1)
        header.golomb((1 << 64) - self.low if negative else self.low, 2)
        if self.kind == EXPONENT:
            header.golomb(self.zeros)
            header.number(self.bare, 1)


def read_split(header: HeaderReader, dtype: np.dtype) -> Split:
    """The split that stands in a header.

    Raises:
      ValueError: for a split that no array has.
    """
    kind, symbols, negative = header.number(2), header.golomb(3) + 1, header.number(1)
    low = header.golomb(2)
    low = ((1 << 64) - low if negative else low) & ((1 << 64) - 1)
    zeros, bare = (header.golomb(), bool(header.number(1))) if kind == EXPONENT else (0, False)
    floating = float_bits(dtype)
    if kind > EXPONENT or symbols > MOST_SYMBOLS or (kind == EXPONENT) != (floating is not None):
        raise ValueError(f"found tokens of kind {kind} and {symbols} of them for {dtype}")
    if floating is not None and (zeros > floating[1] or low + symbols > 1 << floating[0]):
        raise ValueError(f"found exponents from {low} to {low + symbols}, and {zeros} bits left out, for {dtype}")
    return Split(kind, symbols, low, zeros, bare)


def float_bits(dtype: np.dtype) -> tuple[int, int] | None:
    """The bits of exponent and mantissa of floats of 16 bits and more; None for all else, taken as integers."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize == 1:
        return None
    info = jnp.finfo(dtype)
    return int(info.nexp), int(info.nmant)


def patterns(values: np.ndarray) -> np.ndarray:
    """Numbers as unsigned integers of 64 bits: signed integers by value, wrapped; all else by its bits."""
    if jnp.issubdtype(values.dtype, jnp.signedinteger):
        return values.astype(np.int64).view(np.uint64)
    return packing.unsigned(values).astype(np.uint64)


def splits(values: np.ndarray) -> list[Split]:
    """The ways to split these numbers; at least one number."""
    floating = float_bits(values.dtype)
    if floating is not None:
        return [_exponents(values, *floating)]
    numbers = values if jnp.issubdtype(values.dtype, jnp.signedinteger) else packing.unsigned(values)
    low, high = int(numbers.min()), int(numbers.max())
    found, wrapped = [], low & ((1 << 64) - 1)
    if high - low < MOST_SYMBOLS:
        found.append(Split(DIRECT, high - low + 1, wrapped))
    if high - low >= _MANY or (high - low >= 4 * _SMALL and values.size < _MANY):
        found.append(Split(LOG, int(_logs(np.array([high - low], np.uint64))[0]) + 1, wrapped))
    return found


def _exponents(values: np.ndarray, exponent: int, mantissa: int) -> Split:
    least, most, seen, rest = (1 << exponent) - 1, 0, 0, 0
    for _, chunk in chunks(values):
        bits = patterns(chunk)
        powers = bits >> np.uint64(mantissa) & np.uint64((1 << exponent) - 1)
        least, most = min(least, int(powers.min())), max(most, int(powers.max()))
        seen |= int(np.bitwise_or.reduce(bits))
        rest |= int(np.bitwise_or.reduce(bits[powers == 0], initial=np.uint64(0)))
    seen = seen & ((1 << mantissa) - 1) | 1 << mantissa
    zeros = (seen & -seen).bit_length() - 1
    return Split(EXPONENT, most - least + 1, least, zeros, least == 0 and rest == 0)


def chunks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of a flat array, and where they start."""
    for start in range(0, values.size, CHUNK):
        yield start, values[start : start + CHUNK]


def tokens(values: np.ndarray, split: Split) -> np.ndarray:
    """The token of each number, uint8 or uint16."""
    out = np.empty(values.size, np.uint8 if split.symbols <= 256 else np.uint16)
    low, floating = np.uint64(split.low), float_bits(values.dtype)
    if split.kind == DIRECT and values.dtype.itemsize == 1:
        signed = jnp.issubdtype(values.dtype, jnp.signedinteger)
        bits = values.astype(np.int8).view(np.uint8) if signed else packing.unsigned(values)
        return np.subtract(bits, np.uint8(split.low & 255), out=out)  # modulo 256
    for start, chunk in chunks(values):
        bits = patterns(chunk)
        if floating is not None:
            bits = bits >> np.uint64(floating[1]) & np.uint64((1 << floating[0]) - 1)
        offsets = bits - low
        out[start : start + CHUNK] = _logs(offsets) if split.kind == LOG else offsets
    return out


def _logs(offsets: np.ndarray) -> np.ndarray:
    """Below 16 the number; then four tokens an octave."""
    return np.where(offsets < _SMALL, offsets, np.uint64(_SMALL) + _octaves(offsets))


def _octaves(offsets: np.ndarray) -> np.ndarray:
    lengths = _lengths(np.maximum(offsets, np.uint64(_SMALL)))
    return (lengths - np.uint64(5)) * np.uint64(4) + (offsets >> (lengths - np.uint64(3)) & np.uint64(3))


def _lengths(numbers: np.ndarray) -> np.ndarray:
    """Bits of each number, exactly: by halves, since doubles hold no 64 bits."""
    high = numbers >> np.uint64(32)
    halves = np.where(high > 0, high, numbers).astype(np.float64)
    return np.frexp(halves)[1].astype(np.uint64) + np.where(high > 0, np.uint64(32), np.uint64(0))


def raw_widths(split: Split, dtype: np.dtype) -> np.ndarray:
    """How many bits go with each token, int64, shape (symbols,)."""
    which = np.arange(split.symbols)
    if split.kind == LOG:
        return np.where(which < _SMALL, 0, (which - _SMALL) // 4 + 2)
    floating = float_bits(dtype)
    if floating is None:
        return np.zeros(split.symbols, np.int64)
    return np.where((which == 0) & split.bare, 0, 1 + floating[1] - split.zeros)


def raw_bits(values: np.ndarray, split: Split) -> np.ndarray:
    """What goes with the token of each number, uint64."""
    bits, floating = patterns(values), float_bits(values.dtype)
    if floating is None:
        offsets = bits - np.uint64(split.low)
        lengths = _lengths(np.maximum(offsets, np.uint64(_SMALL)))
        return offsets & ((np.uint64(1) << (lengths - np.uint64(3))) - np.uint64(1))
    exponent, mantissa = map(np.uint64, floating)
    fraction = bits & ((np.uint64(1) << mantissa) - np.uint64(1))
    return (bits >> (exponent + mantissa) << mantissa | fraction) >> np.uint64(split.zeros)


def joined(found: np.ndarray, raw: np.ndarray, split: Split, dtype: np.dtype) -> np.ndarray:
    """The numbers that these tokens and raw bits stand for."""
    if split.kind == DIRECT:
        unsigned = np.dtype(f"u{dtype.itemsize}")
        narrow = found.astype(unsigned) + np.array(split.low & (1 << 8 * dtype.itemsize) - 1, unsigned)
        return _narrowed(narrow, dtype)
    found, floating = found.astype(np.uint64), float_bits(dtype)
    if floating is not None:
        exponent, mantissa = map(np.uint64, floating)
        raw = raw << np.uint64(split.zeros)
        fraction = raw & ((np.uint64(1) << mantissa) - np.uint64(1))
        bits = (found + np.uint64(split.low)) << mantissa | fraction | raw >> mantissa << (exponent + mantissa)
    else:
        bits = np.uint64(split.low) + _unlogged(found, raw)
    return _narrowed(bits.astype(f"u{dtype.itemsize}"), dtype)


def _narrowed(narrow: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bit patterns, or signed integers wrapped, as numbers."""
    if jnp.issubdtype(dtype, jnp.signedinteger):  # by value: those of less than a byte have no bits beyond theirs
        return narrow.view(f"i{dtype.itemsize}").astype(dtype)
    return narrow.astype(np.bool_) if dtype == np.bool_ else narrow.view(dtype)


def _unlogged(found: np.ndarray, raw: np.ndarray) -> np.ndarray:
    octave = np.maximum(found, np.uint64(_SMALL)) - np.uint64(_SMALL)
    first = np.uint64(4) + (octave & np.uint64(3))
    return np.where(found < _SMALL, found, first << (octave // np.uint64(4) + np.uint64(2)) | raw)
