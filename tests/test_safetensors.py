"""Files of safetensors: read and written beside the package of that name, and refused where they are damaged."""

import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jcompress as jc
from jcompress.io import StorageError, Tensors, read_safetensors, write_safetensors

RNG = np.random.default_rng(0)
DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32"]
DTYPES += ["float64", "complex64"]
NARROW = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]
ARRAYS = {name: RNG.integers(0, 2, (3, 5)).astype(name) for name in DTYPES}
ARRAYS |= {name: RNG.normal(size=(2, 3)).astype(getattr(ml_dtypes, name)) for name in NARROW}
ARRAYS |= {"scalar": np.float32(3), "none": np.zeros((0, 4), np.float32), "ünïcode/名": np.ones(3, np.int8)}


def same(x, y):
    return x.dtype == y.dtype and x.shape == np.shape(y) and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def forged(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **other):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **other}


def test_all_dtypes_come_back_bit_for_bit(tmp_path):
    size = write_safetensors(tmp_path / "a", ARRAYS, metadata={"format": "jax"})
    found = read_safetensors(tmp_path / "a")
    assert size == os.path.getsize(tmp_path / "a")
    assert found.metadata == {"format": "jax"}
    assert set(found) == set(ARRAYS)
    assert all(same(found[name], np.asarray(x)) for name, x in ARRAYS.items())
    assert {name: x.shape for name, x in found.shapes.items()} == {name: np.shape(x) for name, x in ARRAYS.items()}


def test_rows_are_read_alone(tmp_path):
    whole = RNG.normal(size=(1000, 500)).astype(np.float32)
    write_safetensors(tmp_path / "a", {"w": whole, "v": whole})
    found = read_safetensors(tmp_path / "a")
    tracemalloc.start()
    rows = found.rows("w", 10, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(rows, whole[10:20])
    assert peak < 200_000
    assert found.rows("w", 999).shape == (1, 500)
    assert found.rows("w", 7, 3).shape == (0, 500)


def test_a_tree_of_jax_arrays_and_other_byte_orders(tmp_path):
    tree = {"a": {"kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}, "b": np.arange(3, dtype=">i4")}
    write_safetensors(tmp_path / "a", dict(jc.paths(tree)))
    found = read_safetensors(tmp_path / "a")
    assert same(found["a/kernel"], np.asarray(tree["a"]["kernel"]))
    assert found["b"].tolist() == [0, 1, 2]


def test_the_package_of_that_name_reads_and_writes_the_same(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    plain = {name: x for name, x in ARRAYS.items() if name in DTYPES[:-1] or name == "none"}
    write_safetensors(tmp_path / "ours", plain)
    found = theirs.load_file(str(tmp_path / "ours"))
    assert all(same(found[name], x) for name, x in plain.items())
    theirs.save_file(plain, str(tmp_path / "theirs"), {"a": "b"})
    again = read_safetensors(tmp_path / "theirs")
    assert all(same(again[name], x) for name, x in plain.items())
    assert again.metadata == {"a": "b"}


def test_a_folder_is_read_by_its_index_or_whole(tmp_path):
    write_safetensors(tmp_path / "model-1.safetensors", {"a": np.ones(2, np.int8), "old": np.ones(1, np.int8)})
    write_safetensors(tmp_path / "model-2.safetensors", {"b": np.zeros(3, np.int8)})
    assert set(read_safetensors(tmp_path)) == {"a", "old", "b"}
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_safetensors(tmp_path)
    assert list(found) == ["a", "b"]
    assert found["b"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"a": "../secret.safetensors"}, "in this folder"),
        ({"a": "/etc/passwd"}, "in this folder"),
        ({"a": "gone.safetensors"}, "no such file"),
        ({"c": "m.safetensors"}, "which the index says"),
        (["a"], "weight_map"),
        ({"a": 3}, "weight_map"),
    ],
)
def test_an_index_is_not_trusted(tmp_path, names, said):
    write_safetensors(tmp_path / "m.safetensors", {"a": np.ones(2, np.int8)})
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(StorageError, match=said):
        read_safetensors(tmp_path)


def test_two_files_without_an_index_that_share_a_name(tmp_path):
    for name in ("m", "n"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"a": np.ones(2, np.int8)})
    with pytest.raises(StorageError, match=r"'a' in n.safetensors and in m.safetensors"):
        read_safetensors(tmp_path)


HOSTILE = {
    "empty": (b"", "expected a safetensors file"),
    "short": (b"\0\0\0", "expected a safetensors file"),
    "length beyond": (forged({}, length=1 << 62), "a header of"),
    "length a little beyond": (forged({}, length=3), "a header of 3 bytes"),
    "a long header": (forged({}, length=200_000_000), "a header of"),
    "no json": (forged(b"{'a': 1}"), "no JSON"),
    "no utf-8": (forged(b'{"\xff": 1}'), "no UTF-8"),
    "a list": (forged([1]), "is a list"),
    "deep": (forged(b"[" * 100_000), "nested too deep"),
    "digits": (forged(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON"),
    "twice": (
        forged(
            b'{"w":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
        ),
        "'w' twice",
    ),
    "metadata": (forged({"__metadata__": {"a": 1}}), "no texts"),
    "no object": (forged({"w": 3}), "w: found 3"),
    "a field more": (forged({"w": entry(more=1)}, bytes(8)), "expected dtype, shape"),
    "unknown dtype": (forged({"w": entry("F7")}, bytes(8)), "w: found dtype 'F7'"),
    "dtype of a list": (forged({"w": entry(["F32"])}, bytes(8)), "found dtype"),
    "negative": (forged({"w": entry(shape=(-2,))}, bytes(8)), "w: found shape"),
    "fractional": (forged({"w": entry(shape=(2.0,))}, bytes(8)), "w: found shape"),
    "true": (forged({"w": entry(shape=(True, 2))}, bytes(8)), "w: found shape"),
    "huge": (forged({"w": entry(shape=(1 << 40, 1 << 40))}, bytes(8)), "w: found shape"),
    "huge and empty": (forged({"w": entry(shape=(0, 1 << 62), offsets=(0, 0))}), "w: found shape"),
    "many axes": (forged({"w": entry(shape=[1] * 40)}, bytes(8)), "w: found shape"),
    "larger than its bytes": (forged({"w": entry(shape=(3,))}, bytes(8)), "w: found 8 bytes, expected 12"),
    "offsets backward": (forged({"w": entry(offsets=(8, 0))}, bytes(8)), "w: found -8 bytes"),
    "beyond the file": (forged({"w": entry()}, bytes(4)), "the file was cut short"),
    "bytes behind": (forged({"w": entry()}, bytes(9)), "something added"),
    "overlap": (
        forged({"w": entry(), "v": entry(offsets=(4, 12))}, bytes(12)),
        "v shares bytes with w",
    ),
    "the same bytes": (forged({"w": entry(), "v": entry()}, bytes(8)), "shares bytes"),
    "a hole": (forged({"w": entry(), "v": entry(offsets=(12, 20))}, bytes(20)), "v leaves bytes between it and w"),
    "a hole in front": (forged({"w": entry(offsets=(4, 12))}, bytes(12)), "between it and the header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(tmp_path, name):
    data, said = HOSTILE[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(StorageError, match=said) as error:
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "hostile.safetensors" in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 20_000_000


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = tmp_path / "a.safetensors"
    size = write_safetensors(path, {"w": np.ones(100)})
    found = read_safetensors(path)
    os.truncate(path, size - 8)
    with pytest.raises(StorageError, match="cut short"):
        found["w"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"w": jc.quantize.Int(bits=4)(jnp.ones((4, 2)))}, "w: found Quantized"),
        ({"w": np.ones(2, np.complex128)}, "w: found dtype complex128"),
        ({"w": [1.0]}, "w: found list"),
        ({3: np.ones(2)}, "found the name 3"),
        ({"__metadata__": np.ones(2)}, "'__metadata__'"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path, tensors, said):
    with pytest.raises(StorageError, match=said):
        write_safetensors(tmp_path / "a", tensors)
    assert os.listdir(tmp_path) == []


def test_one_array_at_a_time_is_written(tmp_path):
    shapes = {f"w{i}": jax.ShapeDtypeStruct((1000, 500), np.float32) for i in range(8)}
    lazily = Tensors(shapes, lambda name, start, stop: np.full((stop - start, 500), float(name[1:]), np.float32))
    tracemalloc.start()
    size = write_safetensors(tmp_path / "a", lazily)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 16_000_000
    assert peak < 5_000_000
    assert read_safetensors(tmp_path / "a")["w7"][3, 4] == 7
