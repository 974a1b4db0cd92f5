"""Arrays of numbers as entropy-coded bytes, by asymmetric numeral systems.

The numbers become tokens and raw bits (:mod:`~jcompress.numeric.tokens`), the tokens are coded by the tables of a model
(:mod:`~jcompress.numeric.models`), all of it chosen by the bytes it gives. The coder is that of the package
``constriction``. Frequencies are integers, and the package divides among them by one product of doubles, which IEEE 754
rounds alike everywhere: the same bytes give the same numbers on every machine.

The bytes of an array are a header, the coded tokens, and the raw bits. They say where they end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress.numeric import models, tokens, walks
from jcompress.numeric.grids import Grid, grid_of
from jcompress.numeric.headers import HeaderReader, HeaderWriter
from jcompress.numeric.models import ABOVE, COLUMNS, LEFT, ONE, ROWS, STATE, Model
from jcompress.numeric.packing import BitReader, BitWriter
from jcompress.numeric.tables import MOST_SYMBOLS, Table, read_table, write_tables
from jcompress.numeric.tokens import Split

RAW, CONSTANT = range(2)
_LABELLED = 7
"""Stands where the classes of the number before are told, for those that come within classes of rows."""
_MOST_TOGETHER = 1 << 8


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
    grid = _grid(flat.size, grid)
    if not flat.size or width == 0:
        return b""
    if _is_constant(flat):
        return _packed(CONSTANT, flat[:1], _width(flat, width))
    streams = coder().stack
    plain = width * np.asarray(values).size
    best, most = None, float(plain)
    for split in tokens.splits(flat):
        found = tokens.tokens(flat, split)
        follows = grid.states and split.kind == tokens.DIRECT
        cost, model = models.choose(
            found, split.symbols, grid, walks.quantizers(found, grid, split.low) if follows else None
        )
        if split.kind != tokens.DIRECT:
            cost += (tokens.raw_widths(split, flat.dtype) * np.bincount(found, minlength=split.symbols)).sum()
        if cost < most:
            best, most = (split, found, model), cost
    coded = _encode(flat, grid, *best, streams.AnsCoder()) if best is not None else None
    if coded is not None and 8 * len(coded) < plain:
        return coded
    return _packed(RAW, flat, _width(flat, width))


def _grid(count: int, grid: Grid | None) -> Grid:
    return grid_of((count,)) if grid is None or grid.size != count else grid


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
    queues = walks.parted(found, grid, model, split.low)
    for queue, table in reversed([*zip(queues, model.tables, strict=True)]):
        _push(queue, table, stack)
    if model.labels.size:
        _push(model.labels, model.label_table, stack)
    words = stack.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    header = HeaderWriter()
    header.number(model.kind, 3)
    split.write(header)
    if model.kind in (ABOVE, LEFT):
        header.number(_LABELLED if model.labels.size else model.contexts - 1, 3)
    if model.kind not in (ONE, ABOVE, LEFT) or model.labels.size:
        header.number(model.rows - 1, 3)
    if model.kind in (ABOVE, LEFT):
        header.golomb(model.centre, 3)
        header.golomb(model.reach, 1)
    if model.kind in (ROWS, COLUMNS) or model.labels.size:
        write_tables([model.label_table], header)
    if model.kind in (ABOVE, LEFT, STATE):
        for queue in queues[:-1]:
            header.number(len(queue), flat.size.bit_length())
    write_tables(model.tables, header)
    header.golomb(len(words), 6)
    return header.getvalue() + words + _raw(flat, split, found)


def _group(symbols: int, count: int) -> int:
    """How many tokens are coded as one: a decoder's time goes by the calls, and not by the length of a table."""
    group = 1
    while symbols ** (2 * group) <= min(_MOST_TOGETHER, count // 8) and group < 8:
        group *= 2
    return group


def _probabilities(table: Table, group: int = 1) -> Any:
    """The model of so many tokens in one: products of doubles, which are rounded alike everywhere."""
    alone = table.frequencies.astype(np.float64)
    together = alone
    for _ in range(group - 1):
        together = np.multiply.outer(together, alone).reshape(-1)
    together = together if together.size > 1 else np.append(together, 0.0)
    return coder().model.Categorical(together, perfect=False)


def _push(queue: np.ndarray, table: Table, stack: Any) -> None:
    """Tokens onto the stack of the coder: the whole groups are what a decoder meets first."""
    symbols = len(table.levels)
    group = _group(symbols, queue.size)
    whole = queue.size // group * group
    if whole < queue.size:
        stack.encode_reverse(queue[whole:].astype(np.int32), _probabilities(table))
    if whole:
        grouped = queue[:whole:group].astype(np.int32)
        for i in range(1, group):
            grouped = symbols * grouped + queue[i:whole:group]
        stack.encode_reverse(grouped, _probabilities(table, group))


def _pop(count: int, table: Table, stack: Any) -> np.ndarray:
    """So many tokens off the stack."""
    symbols = len(table.levels)
    group, dtype = _group(symbols, count), np.uint8 if symbols <= 256 else np.uint16
    whole, found = count // group, []
    if group > 1:
        digits = np.arange(symbols**group)[:, None] // symbols ** np.arange(group)[::-1] % symbols
        found.append(digits.astype(dtype)[stack.decode(_probabilities(table, group), whole)].reshape(-1))
    if rest := count - whole * group if group > 1 else count:
        found.append(stack.decode(_probabilities(table), rest))
    return np.concatenate([*found, np.zeros(0, dtype)], dtype=dtype, casting="unsafe")


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
    grid = _grid(count, grid)
    header = HeaderReader(data)
    kind = header.number(3)
    if kind in (RAW, CONSTANT):
        reader = BitReader(data[1:])
        flat = reader.read(count if kind == RAW else 1, width, dtype)
        return (flat if kind == RAW else np.repeat(flat, count)), 1 + -(-reader.nbits // 8)
    return _decode(data, header, kind, dtype, grid)


def _decode(data: memoryview, header: HeaderReader, kind: int, dtype: np.dtype, grid: Grid) -> tuple[np.ndarray, int]:
    split = tokens.read_split(header, dtype)
    model, label_table, sizes = _read_model(header, kind, split.symbols, grid)
    size = header.golomb(6)
    start = header.nbytes
    if start + size > len(data):
        raise ValueError(f"the stream ends at byte {len(data)}; byte {start + size} was wanted")
    words = bytes(data[start : start + size])
    stack = coder().stack.AnsCoder(np.frombuffer(words + b"\0" * (-size % 4), "<u4").astype(np.uint32))
    if label_table is not None:
        model = dataclasses.replace(
            model, labels=_pop(grid.columns if kind in (COLUMNS, LEFT) else grid.rows, label_table, stack)
        )
    sizes = sizes or walks.sizes(grid, model)
    queues = [_pop(n, table, stack) for n, table in zip(sizes, model.tables, strict=True)]
    if not stack.is_empty():
        raise ValueError("found more in a coded stream than its array takes")
    found = walks.joined(queues, grid, model, split.low, np.dtype(np.uint8 if split.symbols <= 256 else np.uint16))
    values, used = _read_raw(data[start + size :], split, found, dtype)
    return values, start + size + used


def _read_model(header: HeaderReader, kind: int, symbols: int, grid: Grid) -> tuple[Model, Table | None, list[int]]:
    """A model without its labels, the table of these, and the lengths of its queues where they stand in the header."""
    told = header.number(3) if kind in (ABOVE, LEFT) else _LABELLED
    rows = header.number(3) + 1 if kind != ONE and told == _LABELLED else 1
    centre, reach = (header.golomb(3), header.golomb(1)) if kind in (ABOVE, LEFT) else (0, 0)
    contexts = Model(kind, [], reach=reach).contexts
    count = contexts * rows
    if (kind == STATE) > bool(grid.states) or centre > MOST_SYMBOLS or reach > MOST_SYMBOLS:
        raise ValueError(f"found the model {kind} with centre {centre} and reach {reach}, which this array cannot have")
    if kind in (ABOVE, LEFT) and (told not in (contexts - 1, _LABELLED) or grid.where is not None):
        raise ValueError(f"found {told + 1} classes of the number before, expected 3 or 5 of an array that is whole")
    labelled = kind in (ROWS, COLUMNS) or rows > 1
    label_table = read_table(rows, None, header) if labelled else None
    sizes = []
    if kind in (ABOVE, LEFT, STATE):
        sizes = [header.number(grid.size.bit_length()) for _ in range(count - 1)]
        if sum(sizes) > grid.size:
            raise ValueError(f"found {sum(sizes)} numbers in a coded stream of {grid.size}")
        sizes.append(grid.size - sum(sizes))
    known: list[Table] = []
    for _ in range(count):
        known.append(read_table(symbols, known[-1] if known else None, header))
    return Model(kind, known, centre=centre, reach=reach), label_table, sizes


def _read_raw(data: memoryview, split: Split, found: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    if split.kind == tokens.DIRECT:
        return tokens.joined(found, np.zeros(0, np.uint64), split, dtype), 0
    widths, reader = tokens.raw_widths(split, dtype), BitReader(data)
    values = np.empty(found.size, dtype)
    for start, chunk in tokens.chunks(found):
        raw, own = np.zeros(chunk.size, np.uint64), widths[chunk]
        for width in np.unique(own) if widths.any() else ():
            here = own == width
            raw[here] = reader.read(int(np.count_nonzero(here)), int(width), np.dtype(np.uint64))
        values[start : start + chunk.size] = tokens.joined(chunk, raw, split, dtype)
    return values, -(-reader.nbits // 8)
