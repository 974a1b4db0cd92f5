import itertools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jcompress.numeric import packing

FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
NARROW = [("int4", 4), ("uint4", 4), ("int2", 2), ("uint2", 2), ("float4_e2m1fn", 4)]

quick = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def bits_of(x):
    return np.ascontiguousarray(x).view(np.uint8)


@st.composite
def pieces(draw):
    """An array, and a width that holds its values."""
    dtype = np.dtype(draw(st.sampled_from(INTEGERS)))
    width = draw(st.integers(1, 8 * dtype.itemsize))
    signed = np.issubdtype(dtype, np.signedinteger)
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    values = draw(st.lists(st.integers(low, high), max_size=40))
    return np.array(values, dtype), width


@quick
@hypothesis.given(st.lists(pieces(), max_size=6))
def test_integers_of_any_width_come_back(arrays):
    writer = packing.BitWriter()
    for values, width in arrays:
        writer.write(values, width)
    data = writer.getvalue()
    total = sum(values.size * width for values, width in arrays)
    assert writer.nbits == total
    assert len(data) == -(-total // 8)
    reader = packing.BitReader(data)
    for values, width in arrays:
        np.testing.assert_array_equal(reader.read(values.size, width, values.dtype), values)
    assert reader.nbits == total


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("skip", [0, 3])
def test_every_bit_pattern_of_a_dtype_comes_back(dtype, skip):
    dtype = jnp.dtype(dtype)
    values = np.random.default_rng(0).integers(0, 256, 64 * dtype.itemsize, np.uint8).view(dtype)
    writer = packing.BitWriter()
    writer.write(np.zeros(skip, np.bool_), 1)
    writer.write(values, 8 * dtype.itemsize)
    reader = packing.BitReader(writer.getvalue())
    assert not reader.read(skip, 1, np.dtype(np.bool_)).any()
    again = reader.read(64, 8 * dtype.itemsize, dtype)
    assert again.dtype == dtype
    np.testing.assert_array_equal(bits_of(again), bits_of(values))


@pytest.mark.parametrize(("dtype", "width"), NARROW)
def test_dtypes_below_a_byte_take_their_own_bits(dtype, width):
    dtype = jnp.dtype(dtype)
    values = np.arange(1 << width, dtype=np.uint8).view(dtype)
    writer = packing.BitWriter()
    writer.write(values, width)
    assert writer.nbits == width << width
    again = packing.BitReader(writer.getvalue()).read(values.size, width, dtype)
    np.testing.assert_array_equal(again.astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize("width", range(1, 9))
def test_codes_of_a_quantizer(width):
    codes = np.arange(-(1 << width - 1), 1 << width - 1).astype(np.int8)
    writer = packing.BitWriter()
    writer.write(codes, width)
    writer.write(codes.view(np.uint8) & ((1 << width) - 1), width)
    reader = packing.BitReader(writer.getvalue())
    np.testing.assert_array_equal(reader.read(codes.size, width, np.dtype(np.int8)), codes)
    unsigned = reader.read(codes.size, width, np.dtype(np.uint8))
    np.testing.assert_array_equal(unsigned, codes.astype(np.int64) % (1 << width))


def test_width_zero_stores_nothing():
    writer = packing.BitWriter()
    writer.write(np.zeros(5, np.uint8), 0)
    writer.write(np.array([7], np.uint8), 3)
    assert writer.getvalue() == b"\x07"
    reader = packing.BitReader(writer.getvalue())
    np.testing.assert_array_equal(reader.read(5, 0, np.dtype(np.uint8)), np.zeros(5))
    assert reader.read(1, 3, np.dtype(np.uint8)).tolist() == [7]


def test_the_stream_is_little_endian_lowest_bit_first():
    writer = packing.BitWriter()
    writer.write(np.array([1, 0, 1], np.bool_), 1)
    writer.write(np.array([0b10110], np.uint8), 5)
    writer.write(np.array([0x1234], np.uint16), 16)
    assert writer.getvalue() == bytes([0b10110101, 0x34, 0x12])


def test_arrays_longer_than_a_chunk():
    values = np.random.default_rng(1).integers(0, 8, packing._CHUNK + 5).astype(np.uint8)
    writer = packing.BitWriter()
    writer.write(values, 3)
    np.testing.assert_array_equal(packing.BitReader(writer.getvalue()).read(values.size, 3, np.dtype(np.uint8)), values)


def test_a_width_beyond_the_dtype_is_refused():
    with pytest.raises(ValueError, match="found width 9, expected 0 to 8"):
        packing.BitWriter().write(np.zeros(1, np.uint8), 9)


def test_reading_past_the_end_is_refused():
    with pytest.raises(ValueError, match="the stream ends at bit 8; bit 9 was wanted"):
        packing.BitReader(b"\x00").read(9, 1, np.dtype(np.uint8))


def cost(mask, scheme, width=1, m=0):
    """The cost of a mask by the definition of each scheme, entry by entry."""
    if scheme == "bits":
        return mask.size
    if scheme == "gaps":
        numbers, gap = 0, 0
        for kept in mask.reshape(-1):
            if kept:
                numbers += 1 + gap // (2**width - 1)
                gap = 0
            else:
                gap += 1
        return numbers * width
    if mask.ndim < 2 or not mask.size or mask.shape[-2] % m:
        return math.inf
    groups = np.moveaxis(mask, -2, -1).reshape(-1, m)
    counts = {int(n) for n in groups.sum(-1)}
    return math.inf if len(counts) > 1 else len(groups) * math.ceil(math.log2(math.comb(m, counts.pop())))


def without_constant_axes(mask):
    for axis in range(mask.ndim):
        if mask.shape[axis] > 1 and np.array_equal(np.broadcast_to(mask.take([0], axis), mask.shape), mask):
            mask = mask.take([0], axis)
    return mask


def cheapest(mask):
    mask = without_constant_axes(mask)
    costs = [cost(mask, "bits")]
    costs += [cost(mask, "gaps", width) for width in range(1, 17)]
    costs += [cost(mask, "choice", m=m) for m in (2, 4, 8, 16, 32)]
    return min(costs)


def check(mask):
    code = packing.mask_code(mask)
    numbers = packing.encode_mask(mask, code)
    count, width = packing.mask_count(code)
    assert numbers.size == count
    writer = packing.BitWriter()
    writer.write(numbers, width)
    assert writer.nbits == code.nbits == cheapest(mask)
    again = packing.BitReader(writer.getvalue()).read(count, width, np.dtype(np.uint32))
    np.testing.assert_array_equal(packing.decode_mask(again, code, mask.shape), mask)
    return code


@quick
@hypothesis.given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)), st.booleans())
def test_any_mask_comes_back_at_its_least_cost(mask, invert):
    check(~mask if invert else mask)


@quick
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 0.3), st.sampled_from([(600,), (40, 30), (3, 16, 20)]))
def test_sparse_masks(seed, density, shape):
    check(np.random.default_rng(seed).random(shape) < density)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 4, 8, 16, 32) for n in {1, m // 2, m - 1}])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_patterns_of_n_in_m(n, m, lead):
    scores = np.random.default_rng(n).random((*lead, 2, m, 12))
    mask = (scores.argsort(-2).argsort(-2) < n).reshape(*lead, 2 * m, 12)
    code = check(mask)
    if (n, m) in [(2, 4), (4, 8), (1, 2)]:
        assert (code.scheme, code.n, code.m) == ("choice", n, m)


def test_two_in_four_costs_three_bits_a_group_and_uses_all_six_subsets():
    subsets = np.array([[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)])
    code = packing.mask_code(subsets.T)
    assert code.nbits == 3 * 6
    assert sorted(packing.encode_mask(subsets.T, code).tolist()) == list(range(6))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8, 6), (2, 8, 6)])
def test_constant_masks_cost_a_bit_or_nothing(shape):
    assert check(np.ones(shape, np.bool_)).nbits == 1
    assert check(np.zeros(shape, np.bool_)).nbits == 0


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 4)])
def test_empty_masks_cost_nothing(shape):
    assert check(np.zeros(shape, np.bool_)).nbits == 0


def test_rows_and_columns_cost_one_bit_each_at_most():
    rng = np.random.default_rng(0)
    rows = rng.random((40, 1)) < 0.5
    assert check(np.broadcast_to(rows, (40, 64)).copy()).nbits <= 40
    assert check(np.broadcast_to(rows.T, (64, 40)).copy()).nbits <= 40


def test_a_long_gap_is_escaped():
    mask = np.zeros(200_000, np.bool_)
    mask[[0, 199_999]] = True
    code = check(mask)
    assert code.scheme == "gaps"
    assert code.nbits < 100


@pytest.mark.parametrize("dtype", ["i2", "u4", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("skip", [0, 3])
def test_the_byte_order_of_an_array_does_not_matter(dtype, skip):
    streams = []
    for order in "<>":
        writer = packing.BitWriter()
        writer.write(np.zeros(skip, np.bool_), 1)
        writer.write(np.arange(-3, 300).astype(dtype).astype(order + dtype), 8 * np.dtype(dtype).itemsize)
        streams.append(writer.getvalue())
    assert streams[0] == streams[1]


def test_pieces_go_to_a_sink_in_order():
    values, pieces = np.arange(3 * packing._CHUNK, dtype=np.uint32), []
    whole, piecewise = packing.BitWriter(), packing.BitWriter(pieces.append)
    for writer in (whole, piecewise):
        writer.write(values, 32)
        writer.write(values, 21)
    piecewise.close()
    assert b"".join(pieces) == whole.getvalue()
    assert max(map(len, pieces)) <= 4 * packing._CHUNK


def test_numbers_beyond_the_choices_are_refused():
    code = packing.MaskCode("choice", (4, 1), 3, width=3, n=2, m=4)
    with pytest.raises(ValueError, match="found a number beyond the 6 choices of 2 among 4"):
        packing.decode_mask(np.array([6], np.uint32), code, (4, 1))
