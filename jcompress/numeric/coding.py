"""Arrays of numbers as entropy-coded bytes, by asymmetric numeral systems.

The numbers become tokens and raw bits (:mod:`~jcompress.numeric.tokens`), the tokens are coded by the tables of a model
(:mod:`~jcompress.numeric.models`), all of it chosen by the bytes it gives. The coder is that of the package
``constriction``. Frequencies are integers, and the package divides among them by one product of doubles, which IEEE 754
rounds alike everywhere: the same bytes give the same numbers on every machine.

The bytes of an array are a header, the coded tokens, and the raw bits. They say where they end.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress.numeric import models, tokens
from jcompress.numeric.grids import Grid, grid_of
from jcompress.numeric.headers import HeaderReader, HeaderWriter
from jcompress.numeric.models import ABOVE, COLUMNS, LEFT, ONE, ROWS, Model
from jcompress.numeric.packing import BitReader, BitWriter
from jcompress.numeric.tables import MOST_SYMBOLS, Table, read_table, write_table
from jcompress.numeric.tokens import Split

RAW, CONSTANT = range(2)
_MOST_CLASSES = 8


def coder() -> Any:
    """The stream codes of the package that codes.

    Raises:
      ImportError: where it is not installed.
    """
    try:
        import constriction
    except ImportError:
        raise ImportError(
            "entropy-coded files need the package 'constriction', which is not installed; "
            "pip install 'jcompress[coded]', or save with coded=False"
        ) from None
    return constriction.stream


def encode(values: np.ndarray, width: int, grid: Grid | None = None) -> bytes:
    """The fewest bytes that hold these numbers by any of the models.

    Args:
      values: integers, truth values or floats, any shape; taken in C order.
      width: how many bits of each count, as where they are stored without coding.
      grid: where they stand in their array; one row of them by default.

    Returns:
      The bytes, from which :func:`decode` reads the numbers again, bit for bit.

    Raises:
      ImportError: where the coder is not installed.
    """
    flat = _real(np.asarray(values).reshape(-1))
    grid = grid_of((flat.size,)) if grid is None or grid.size != flat.size else grid
    if not flat.size or width == 0:
        return b""
    if _is_constant(flat):
        return _packed(CONSTANT, flat[:1], _width(flat, width))
    streams = coder().stack
    best, most = None, width * np.asarray(values).size / 8
    for split in tokens.splits(flat):
        found = tokens.tokens(flat, split)
        cost, model = models.choose(found, split.symbols, grid)
        cost += (tokens.raw_widths(split, flat.dtype) * np.bincount(found, minlength=split.symbols)).sum()
        if cost / 8 < most:
            best, most = (split, found, model), cost / 8
    coded = _encode(flat, grid, *best, streams.AnsCoder()) if best is not None else None
    if coded is not None and 8 * len(coded) < width * np.asarray(values).size:
        return coded
    return _packed(RAW, flat, _width(flat, width))


def _real(flat: np.ndarray) -> np.ndarray:
    return flat.view(f"{flat.dtype.byteorder}f{flat.dtype.itemsize // 2}") if flat.dtype.kind == "c" else flat


def _width(flat: np.ndarray, width: int) -> int:
    """Bits an element, of complex numbers bits a part."""
    return min(width, 8 * flat.dtype.itemsize)


def _is_constant(flat: np.ndarray) -> bool:
    first = tokens.patterns(flat[:1])[0]
    return all((tokens.patterns(chunk) == first).all() for _, chunk in tokens.chunks(flat))


def _packed(kind: int, flat: np.ndarray, width: int) -> bytes:
    header = HeaderWriter()
    header.number(kind, 3)
    writer = BitWriter()
    writer.write(flat, width)
    return header.getvalue() + writer.getvalue()


def _encode(flat: np.ndarray, grid: Grid, split: Split, found: np.ndarray, model: Model, stack: Any) -> bytes:
    if model.kind == LEFT:
        found, grid = _turned(found, grid), grid.turned()
    _push(found, grid, model, stack)
    words = stack.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    header = HeaderWriter()
    header.number(model.kind, 3)
    split.write(header)
    if model.kind != ONE:
        header.number(len(model.tables) - 1, 3)
    if model.kind in (ABOVE, LEFT):
        header.golomb(model.centre, 3)
        header.golomb(model.reach, 1)
    if model.kind in (ROWS, COLUMNS):
        write_table(model.label_table, None, header)
    before = None
    for table in model.tables:
        write_table(table, before, header)
        before = table
    header.golomb(len(words), 6)
    return header.getvalue() + words + _raw(flat, split, _turned(found, grid) if model.kind == LEFT else found)


def _turned(found: np.ndarray, grid: Grid) -> np.ndarray:
    return np.ascontiguousarray(found.reshape(grid.rows, grid.columns).T).reshape(-1)


def _probabilities(table: Table) -> Any:
    frequencies = table.frequencies.astype(np.float64)
    return coder().model.Categorical(np.pad(frequencies, (0, int(frequencies.size == 1))), perfect=False)


def _push(found: np.ndarray, grid: Grid, model: Model, stack: Any) -> None:
    """The tokens onto the stack of the coder, last chunk and last class first."""
    known = [_probabilities(table) for table in model.tables]
    for first, last, part in reversed(list(grid.slices(model.kind in (ABOVE, LEFT)))):
        symbols = found[part].astype(np.int32)
        if model.kind == ONE:
            stack.encode_reverse(symbols, known[0])
            continue
        classes = model.classes(grid, first, last, found[max(part.start - grid.columns, 0) : part.start])
        for which in reversed(range(len(known))):
            chosen = symbols[classes == which]
            if chosen.size:
                stack.encode_reverse(chosen, known[which])
    if model.labels.size:
        stack.encode_reverse(model.labels.astype(np.int32), _probabilities(model.label_table))


def _raw(flat: np.ndarray, split: Split, found: np.ndarray) -> bytes:
    """The raw bits, chunk by chunk, in each by their widths."""
    widths = tokens.raw_widths(split, flat.dtype)
    writer = BitWriter()
    for start, chunk in tokens.chunks(flat) if widths.any() else ():
        bits, own = tokens.raw_bits(chunk, split), widths[found[start : start + chunk.size]]
        for width in np.unique(own):
            writer.write(bits[own == width], int(width))
    return writer.getvalue()


def decode(
    data: memoryview, count: int, width: int, dtype: np.dtype, grid: Grid | None = None
) -> tuple[np.ndarray, int]:
    """The numbers that :func:`encode` coded, and how many bytes that took.

    Args:
      data: bytes that begin with those of the array.
      count: how many numbers.
      width: as it was given to :func:`encode`.
      dtype: that of the numbers.
      grid: as it was given to :func:`encode`.

    Returns:
      The numbers, shape (count,), and the number of bytes read.

    Raises:
      ImportError: where the coder is needed and not installed.
      ValueError: for bytes that :func:`encode` does not give.
    """
    if not count or width == 0:
        return np.zeros(count, dtype), 0
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts, used = decode(data, 2 * count, width // 2, np.dtype(f"f{dtype.itemsize // 2}"))
        return parts.view(dtype), used
    grid = grid_of((count,)) if grid is None or grid.size != count else grid
    header = HeaderReader(data)
    kind = header.number(3)
    if kind in (RAW, CONSTANT):
        reader = BitReader(data[1:])
        flat = reader.read(count if kind == RAW else 1, width, dtype)
        return (flat if kind == RAW else np.repeat(flat, count)), 1 + -(-reader.nbits // 8)
    return _decode(data, header, kind, dtype, grid)


def _decode(data: memoryview, header: HeaderReader, kind: int, dtype: np.dtype, grid: Grid) -> tuple[np.ndarray, int]:
    split = tokens.read_split(header, dtype)
    model, label_table = _read_model(header, kind, split.symbols)
    start, size = 0, header.golomb(6)
    start = header.nbytes
    if start + size > len(data):
        raise ValueError(f"the stream ends at byte {len(data)}; byte {start + size} was wanted")
    words = bytes(data[start : start + size])
    stack = coder().stack.AnsCoder(np.frombuffer(words + b"\0" * (-size % 4), "<u4").astype(np.uint32))
    if kind == LEFT:
        found = _turned(_pop(grid.turned(), model, label_table, split.symbols, stack), grid.turned())
    else:
        found = _pop(grid, model, label_table, split.symbols, stack)
    if not stack.is_empty():
        raise ValueError("found more in a coded stream than its array takes")
    values, used = _read_raw(data[start + size :], split, found, dtype)
    return values, start + size + used


def _read_model(header: HeaderReader, kind: int, symbols: int) -> tuple[Model, Table | None]:
    count = 1 if kind == ONE else header.number(3) + 1
    centre, reach = (header.golomb(3), header.golomb(1)) if kind in (ABOVE, LEFT) else (0, 0)
    if kind > LEFT or centre > MOST_SYMBOLS or reach > MOST_SYMBOLS:
        raise ValueError(f"found the model {kind} with centre {centre} and reach {reach}, which this version has not")
    if kind in (ABOVE, LEFT) and count != (5 if reach else 3):
        raise ValueError(f"found {count} classes of the number before, expected 3 or 5")
    label_table = read_table(count, None, header) if kind in (ROWS, COLUMNS) else None
    known: list[Table] = []
    for _ in range(count):
        known.append(read_table(symbols, known[-1] if known else None, header))
    return Model(kind, known, centre=centre, reach=reach), label_table


def _pop(grid: Grid, model: Model, label_table: Table | None, symbols: int, stack: Any) -> np.ndarray:
    """The tokens off the stack, first chunk and first class first."""
    known = [_probabilities(table) for table in model.tables]
    if label_table is not None:
        labels = stack.decode(_probabilities(label_table), grid.rows if model.kind == ROWS else grid.columns)
        model = Model(model.kind, model.tables, labels.astype(np.uint8))
    out = np.empty(grid.size, np.uint8 if symbols <= 256 else np.uint16)
    for first, last, part in grid.slices(model.kind in (ABOVE, LEFT)):
        if model.kind == ONE:
            out[part] = stack.decode(known[0], part.stop - part.start)
            continue
        classes = model.classes(grid, first, last, out[max(part.start - grid.columns, 0) : part.start])
        chunk = out[part]
        for which, probabilities in enumerate(known):
            here = classes == which
            amount = int(np.count_nonzero(here))
            if amount:
                chunk[here] = stack.decode(probabilities, amount)
    return out


def _read_raw(data: memoryview, split: Split, found: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    widths, reader = tokens.raw_widths(split, dtype), BitReader(data)
    values = np.empty(found.size, dtype)
    for start, chunk in tokens.chunks(found):
        raw, own = np.zeros(chunk.size, np.uint64), widths[chunk]
        for width in np.unique(own) if widths.any() else ():
            here = own == width
            raw[here] = reader.read(int(np.count_nonzero(here)), int(width), np.dtype(np.uint64))
        values[start : start + chunk.size] = tokens.joined(chunk, raw, split, dtype)
    return values, -(-reader.nbits // 8)
