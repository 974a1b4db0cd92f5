"""Files of GGUF: read and written beside the package of that name, and refused where they are damaged."""

import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import jcompress as jc
from jcompress.io import StorageError, blocks, read_gguf, write_gguf

RNG = np.random.default_rng(0)
ARRAYS = {
    "token_embd.weight": RNG.normal(size=(4, 32)).astype(np.float32),
    "half": RNG.normal(size=(2, 3, 5)).astype(np.float16),
    "brain": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "wide": RNG.normal(size=(3,)),
    "ints": np.arange(5, dtype=np.int32),
}
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": np.uint32(2),
    "llama.eps": np.float32(1e-5),
    "a.bool": True,
    "a.long": np.int64(-(1 << 40)),
    "a.byte": np.uint8(7),
    "tokens": ["a", "ü", ""],
    "types": np.array([1, 2, 3], np.int32),
    "bools": np.array([True, False]),
    "nested": [["a"], ["b", "c"]],
    "none": [],
}


def u32(x):
    return int(x).to_bytes(4, "little")


def u64(x):
    return int(x).to_bytes(8, "little")


def text(x):
    data = x if isinstance(x, bytes) else x.encode()
    return u64(len(data)) + data


def array(name="w", shape=(2,), kind=0, offset=0, ndim=None):
    return text(name) + u32(len(shape) if ndim is None else ndim) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


def forged(arrays=(), pairs=(), payload=b"", version=3, counts=None):
    counts = (len(arrays), len(pairs)) if counts is None else counts
    head = b"GGUF" + u32(version) + u64(counts[0]) + u64(counts[1]) + b"".join(pairs) + b"".join(arrays)
    return head + bytes(-len(head) % 32) + payload


def equal(x, y):
    return type(x) is type(y) and np.array_equal(x, y) and getattr(x, "dtype", None) == getattr(y, "dtype", None)


def test_arrays_and_metadata_come_back_with_their_types(tmp_path):
    size = write_gguf(tmp_path / "a", ARRAYS, metadata=METADATA)
    found = read_gguf(tmp_path / "a")
    assert size == os.path.getsize(tmp_path / "a")
    assert list(found) == list(ARRAYS)
    for name, x in ARRAYS.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    nested = {"nested", "none"}
    assert all(equal(found.metadata[name], x) for name, x in METADATA.items() if name not in nested)
    assert [found.metadata[name] for name in nested] == [METADATA[name] for name in nested]
    np.testing.assert_array_equal(found.rows("token_embd.weight", 1, 3), ARRAYS["token_embd.weight"][1:3])


def test_python_numbers_get_the_usual_types(tmp_path):
    write_gguf(tmp_path / "a", {}, metadata={"n": 3, "x": 0.5, "m": -3, "big": 1 << 40})
    found = read_gguf(tmp_path / "a").metadata
    types = {name: type(x) for name, x in found.items()}
    assert types == {"n": np.uint32, "x": np.float32, "m": np.int32, "big": np.uint64}


def block_bytes(kind, count=40):
    """Blocks of any codes, their scales finite."""
    raw = RNG.integers(0, 256, (count, blocks.KINDS[kind].nbytes), dtype=np.uint8)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for at in halves:
        raw[:, at : at + 2] = RNG.normal(size=(count, 1)).astype(np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", blocks.DECODED)
def test_blocks_stand_for_what_the_package_says(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    raw = block_bytes(kind)
    of = getattr(gguf.GGMLQuantizationType, kind)
    expected = gguf.quants.dequantize(raw, of)
    np.testing.assert_array_equal(blocks.decode(raw.reshape(-1), kind), expected.reshape(-1))
    writer = gguf.GGUFWriter(str(tmp_path / "a"), "llama")
    writer.add_tensor("w", raw.reshape(8, -1), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "a")
    assert found.kinds["w"] == kind
    np.testing.assert_array_equal(found["w"], expected.reshape(8, -1))
    np.testing.assert_array_equal(found.rows("w", 3, 5), expected.reshape(8, -1)[3:5])


def test_the_kinds_are_those_of_the_package():
    gguf = pytest.importorskip("gguf")
    for name, kind in blocks.KINDS.items():
        of = getattr(gguf.GGMLQuantizationType, name)
        assert (of.value, *gguf.GGML_QUANT_SIZES[of]) == kind


def test_the_package_reads_what_is_written(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "a", ARRAYS, metadata={k: x for k, x in METADATA.items() if k not in ("nested", "none")})
    reader = gguf.GGUFReader(str(tmp_path / "a"))
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["tokens"].contents() == ["a", "ü", ""]
    for tensor in reader.tensors:
        expected = np.asarray(ARRAYS[tensor.name])
        assert tuple(int(n) for n in tensor.shape)[::-1] == expected.shape
        assert tensor.data.tobytes() == expected.tobytes()


def test_a_kind_that_is_not_known_is_listed_and_not_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(forged([array(shape=(256,), kind=16)], payload=bytes(96)))
    found = read_gguf(path)
    assert (found.kinds, found.sizes) == ({"w": "IQ2_XXS"}, {"w": 66})
    with pytest.raises(StorageError, match="w: found IQ2_XXS, expected one of F32"):
        found["w"]


KEY = text("k")
HOSTILE = {
    "empty": (b"", "no GGUF"),
    "another": (b"PK" + bytes(100), "no GGUF"),
    "version 1": (forged(version=1), "version 1"),
    "big-endian": (forged(version=3 << 24), "little-endian"),
    "many pairs": (forged(counts=(0, 1 << 60)), "metadata of"),
    "many arrays": (forged(counts=(1 << 60, 0)), "arrays of"),
    "a long name": (forged(pairs=[u64(1 << 62)], counts=(0, 1)), "cut short"),
    "a long text": (forged(pairs=[KEY + u32(8) + u64(1 << 40)]), "cut short"),
    "a long array": (forged(pairs=[KEY + u32(9) + u32(4) + u64(1 << 61)]), "cut short"),
    "a long array of texts": (forged(pairs=[KEY + u32(9) + u32(8) + u64(1 << 61)]), "cut short"),
    "arrays in arrays": (forged(pairs=[KEY + (u32(9) + u64(1)[:0]) + (u32(9) + u64(1)) * 40]), "nested too deep"),
    "unknown type": (forged(pairs=[KEY + u32(13) + u64(0)]), "of type 13"),
    "no utf-8": (forged(pairs=[text(b"\xff") + u32(0) + b"\0"], payload=bytes(32)), "no UTF-8"),
    "metadata twice": (forged(pairs=[KEY + u32(0) + b"\0"] * 2), "'k' twice"),
    "alignment 0": (forged(pairs=[text("general.alignment") + u32(4) + u32(0)]), "alignment 0"),
    "alignment of text": (forged(pairs=[text("general.alignment") + u32(8) + text("32")]), "alignment 32"),
    "an array twice": (forged([array(), array()], payload=bytes(32)), "'w' twice"),
    "many axes": (forged([array(ndim=1 << 31)]), "axes, expected at most 8"),
    "huge": (forged([array(shape=(1 << 40, 1 << 40))]), "larger than any memory"),
    "huge and empty": (forged([array(shape=(0, 1 << 62))]), "larger than any memory"),
    "unknown numbers": (forged([array(kind=77)]), "w: found numbers of type 77"),
    "half a block": (forged([array(shape=(33,), kind=2)], payload=bytes(64)), "whole blocks of 32"),
    "beyond the file": (forged([array(shape=(100,))], payload=bytes(32)), "w: found 400 bytes"),
    "a far place": (forged([array(offset=1 << 63)], payload=bytes(32)), "w: found 8 bytes at"),
    "an odd place": (forged([array(offset=8)], payload=bytes(32)), "a multiple of 32"),
    "overlap": (forged([array(shape=(16,)), array("v", offset=32)], payload=bytes(64)), "v shares bytes with w"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(tmp_path, name):
    data, said = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(StorageError, match=said) as error:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "hostile.gguf" in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 5_000_000


def test_every_cut_is_noticed(tmp_path):
    write_gguf(tmp_path / "a", ARRAYS, metadata=METADATA)
    whole = (tmp_path / "a").read_bytes()
    for stop in [*range(0, len(whole) - 100, 37), len(whole) - 13]:
        (tmp_path / "b").write_bytes(whole[:stop])
        with pytest.raises(StorageError):
            read_gguf(tmp_path / "b")


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"w": jc.quantize.Int(bits=4)(np.ones((4, 2), np.float32))}, {}, "w: found Quantized"),
        ({"w": np.ones(2, np.complex64)}, {}, "w: found dtype complex64"),
        ({"w" * 70: np.ones(2)}, {}, "a name of at most 63"),
        ({"w": np.ones((1,) * 5)}, {}, "at most 4 axes"),
        ({}, {"k": [1, "a"]}, "'k'"),
        ({}, {"k": {"a": 1}}, "'k'"),
        ({}, {"k": 1 << 70}, "'k'"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path, tensors, metadata, said):
    with pytest.raises(StorageError, match=said):
        write_gguf(tmp_path / "a", tensors, metadata=metadata)
    assert os.listdir(tmp_path) == []
