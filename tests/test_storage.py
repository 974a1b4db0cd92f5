import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from processes_worker import spec_of, stored_tree

import jcompress as jc
from jcompress import cli
from jcompress.io import StorageError, inspect, manifest

W = jax.random.normal(jax.random.key(0), (32, 12))
P, Q, F, S = jc.prune, jc.quantize, jc.factorize, jc.share

METHODS = {
    "magnitude": P.Magnitude(sparsity=0.9),
    "dense mask": P.Magnitude(sparsity=0.3),
    "keep all": P.Magnitude(sparsity=0.0),
    "keep none": P.Magnitude(sparsity=1.0),
    "2:4": P.Magnitude(pattern=P.NM(2, 4)),
    **{f"int{bits}": Q.Int(bits=bits) for bits in range(1, 9)},
    **{f"affine{bits}": Q.Int(bits=bits, symmetric=False) for bits in (2, 5, 8)},
    "groups": Q.Int(bits=3, group_size=8),
    "tensor": Q.Int(bits=4, axis=None),
    "bfloat16": Q.Float("bfloat16"),
    "float8": Q.Float("float8_e4m3fn"),
    "svd": F.SVD(rank=3),
    "kmeans": S.KMeans(clusters=5),
    "one cluster": S.KMeans(clusters=1),
    "many clusters": S.KMeans(clusters=300),
    "mask, codebook": jc.chain(P.Magnitude(sparsity=0.8), S.KMeans(clusters=5)),
    "mask, codebook, bfloat16": jc.chain(P.Magnitude(sparsity=0.8), S.KMeans(clusters=4), Q.Float()),
    "mask, integers": jc.chain(P.Magnitude(sparsity=0.6), Q.Int(bits=3, symmetric=False)),
    "mask, float8": jc.chain(P.Magnitude(sparsity=0.6), Q.Float("float8_e5m2")),
    "factors in 4 bits": jc.chain(F.SVD(rank=3), Q.Int(bits=4)),
    "sparse factors": jc.chain(F.SVD(rank=6), P.Magnitude(sparsity=0.5), Q.Int(bits=5)),
    "integers, scales in bfloat16": jc.chain(Q.Int(bits=4), Q.Float()),
    "outliers": jc.residual(P.Magnitude(sparsity=0.97), Q.Int(bits=2)),
    "quantized + low rank": jc.residual(Q.Int(bits=4), jc.chain(F.SVD(rank=2), Q.Float())),
    "three terms": jc.residual(
        P.Magnitude(sparsity=0.9), jc.chain(P.Magnitude(sparsity=0.5), Q.Int(bits=3)), F.SVD(rank=1)
    ),
}
NARROW = ["2:4", "groups", "affine2", "svd", "mask, codebook"]
STACKED = ["2:4", "groups", "mask, codebook", "factors in 4 bits"]


def bits(x):
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(bits(a), bits(b))


def payload_bytes(path):
    data = path.read_bytes()
    header = data[: data.index(b"\n") + 1]
    assert len(data) == len(header) + int(header.split()[2]) + int(header.split()[4])
    return int(header.split()[4])


def check_round_trip(path, tree):
    size = jc.save(path, tree)
    assert size == path.stat().st_size
    assert payload_bytes(path) == math.ceil(jc.nbits(tree) / 8)
    again = jc.load(path)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(assert_same_bits, jc.materialize(again), jc.materialize(tree))
    assert jc.nbits(again) == jc.nbits(tree)
    again_like = jc.load(path, like=jax.eval_shape(lambda: tree))
    jax.tree.map(assert_same_bits, again_like, again)
    return again


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in METHODS), *((name, "bfloat16") for name in NARROW)]
)
def test_every_format_and_nest_comes_back_at_its_claimed_size(tmp_path, name, dtype):
    params = {"kernel": W.astype(dtype), "bias": jnp.arange(3, dtype=dtype)}
    small = jc.compress(params, jc.plan(params, [("kernel", METHODS[name])]))
    check_round_trip(tmp_path / "x", small)


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers(tmp_path, name):
    params = {"kernel": jnp.stack([W, 2 * W[::-1]])}
    small = jc.compress(params, jc.plan(params, [("kernel", jc.stacked(METHODS[name]))]))
    check_round_trip(tmp_path / "x", small)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (5,), (3, 3, 2, 4)])
def test_shapes(tmp_path, shape):
    x = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    node = jc.formats.Masked(values=x, mask=x > 3)
    assert_same_bits(check_round_trip(tmp_path / "x", {"w": node})["w"].mask, x > 3)


def test_what_a_mask_hides_is_not_stored_and_comes_back_as_zero(tmp_path):
    mask = W > 0.5
    codes = jnp.full(W.shape, 3, jnp.int8)
    node = jc.formats.Masked(values=jc.formats.Quantized(codes=codes, scale=jnp.ones((1, 12)), bits=3), mask=mask)
    again = check_round_trip(tmp_path / "x", [node])[0]
    np.testing.assert_array_equal(again.values.codes, np.where(mask, 3, 0))
    hidden_nan = jc.formats.Masked(values=jnp.where(mask, W, jnp.nan), mask=mask)
    assert_same_bits(check_round_trip(tmp_path / "x", [hidden_nan])[0].values, jnp.where(mask, W, 0.0))


DTYPES = [
    *("bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
    *("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "bfloat16", "float16", "float32"),
    "complex64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_dtype(tmp_path, dtype):
    dtype = jnp.dtype(dtype)
    values = np.random.default_rng(0).integers(0, 256, 24 * dtype.itemsize, np.uint8)
    if jc.core.dtype_bits(dtype) < 8:
        values &= (1 << jc.core.dtype_bits(dtype)) - 1
    x = jnp.asarray(values.view(dtype).reshape(4, 6))
    check_round_trip(tmp_path / "x", {"x": x, "after": jnp.ones(3), "scalar": x[0, 0], "none": x[:0]})


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "complex128"])
def test_arrays_of_64_bits_are_not_narrowed(tmp_path, dtype):
    x = (np.arange(6) / np.float64(3)).astype(dtype).reshape(2, 3)
    jc.save(tmp_path / "x", [np.array(True), x])
    again = jc.load(tmp_path / "x")[1]
    assert_same_bits(again, x)
    assert_same_bits(jc.load(tmp_path / "x", like=[np.array(False), x])[1], x)


def test_non_finite_and_signed_zero(tmp_path):
    check_round_trip(tmp_path / "x", [jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0, 1e-45])])


Point = collections.namedtuple("Point", ["x", "y"])


def test_containers_come_back_without_a_template(tmp_path):
    tree = {
        "z first": [jnp.ones(2), (jnp.zeros(1), None), []],
        "int keys": {3: jnp.ones(1), 1: {}, "3": jnp.zeros(1)},
        "$dollar": {"$": jnp.ones(1), "$tuple": ()},
        "numbers": [1, 2.5, True, 10**30, -0.0, 3 + 4j, complex(math.inf, 1), math.inf, "text", "float32[3]"],
        "é/slash": jnp.ones(1),
    }
    jc.save(tmp_path / "x", tree)
    again = jc.load(tmp_path / "x")
    assert list(again) == list(tree)
    assert again["numbers"] == tree["numbers"]
    assert list(map(type, again["numbers"])) == list(map(type, tree["numbers"]))
    assert math.copysign(1, again["numbers"][4]) == -1
    assert list(again["int keys"]) == [3, 1, "3"]
    again["int keys"].pop("3"), tree["int keys"].pop("3")
    assert jax.tree.structure(again) == jax.tree.structure(tree)


@pytest.mark.parametrize("tree", [None, {}, [], (), 3, jnp.ones(2)], ids=str)
def test_the_smallest_trees(tmp_path, tree):
    jc.save(tmp_path / "x", tree)
    again = jc.load(tmp_path / "x")
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert type(again) is type(tree)


def test_nan_scalar(tmp_path):
    jc.save(tmp_path / "x", {"x": math.nan})
    assert math.isnan(jc.load(tmp_path / "x")["x"])


def test_named_tuples_keep_name_and_fields(tmp_path):
    jc.save(tmp_path / "x", Point(jnp.ones(2), Point(jnp.zeros(1), 3)))
    again, twice = jc.load(tmp_path / "x"), jc.load(tmp_path / "x")
    assert (type(again).__name__, again._fields) == ("Point", ("x", "y"))
    assert again.y.y == 3
    assert jax.tree.structure(again) == jax.tree.structure(twice)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_prng_keys(tmp_path, impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), 3)
    tree = {"keys": keys, "one": keys[0]}
    jc.save(tmp_path / "x", tree)
    assert payload_bytes(tmp_path / "x") == math.ceil(jc.nbits(tree) / 8)
    again = jc.load(tmp_path / "x", like=jax.eval_shape(lambda: tree))
    assert again["keys"].dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.normal(again["one"], (4,)), jax.random.normal(keys[0], (4,)))
    np.testing.assert_array_equal(jax.random.key_data(again["keys"]), jax.random.key_data(keys))


def test_nnx_state_and_other_containers_by_path(tmp_path):
    state = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))))
    tree = {"state": state, "frozen": flax.core.freeze({"a": {"b": jnp.ones(2)}})}
    jc.save(tmp_path / "x", tree)
    plain = jc.load(tmp_path / "x")
    assert set(plain["state"]["layers"]) == {0, 1}
    assert_same_bits(plain["state"]["layers"][0]["kernel"], jax.tree.leaves(state["layers"][0]["kernel"])[0])
    again = jc.load(tmp_path / "x", like=tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(assert_same_bits, again, tree)


def test_compressed_nnx_state(tmp_path):
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    small = jc.compress(state, jc.plan(state, [("kernel", P.Magnitude(sparsity=0.5))]))
    jc.save(tmp_path / "x", small)
    assert payload_bytes(tmp_path / "x") == math.ceil(jc.nbits(small) / 8)
    again = jc.load(tmp_path / "x", like=small)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    dense = jc.materialize(jc.load(tmp_path / "x"))["kernel"]
    assert_same_bits(dense, jc.materialize(jax.tree.leaves(small, is_leaf=jc.core.is_node)[1]))


def test_sharded_arrays_are_gathered_and_can_go_back(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    node = METHODS["mask, codebook"](W)
    small = {"w": dataclasses.replace(node, mask=jax.device_put(node.mask, sharding))}
    small["x"] = jax.device_put(W, sharding)
    check_round_trip(tmp_path / "x", small)
    again = jc.load(tmp_path / "x", like=jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), small))
    assert len(again["w"].mask.sharding.device_set) == 1
    again = jc.load(tmp_path / "x", like=small)
    assert again["w"].mask.sharding == again["x"].sharding == sharding


@pytest.mark.parametrize("coded", [False, True])
def test_a_rule_says_where_arrays_go(coded, tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tree = stored_tree()
    jc.save(tmp_path / "x", tree, coded=coded)
    seen = {}

    def rule(path, x):
        seen[path] = (x.shape, x.dtype)
        spec = spec_of(x.shape)
        return jax.sharding.NamedSharding(mesh, spec) if path != "whole" else None

    again = jc.load(tmp_path / "x", sharding=rule)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert again.pop("epoch") == tree.pop("epoch")
    assert_same_bits(*(jax.random.key_data(x["keys"]) for x in (again, tree)))
    for path in tree.keys() - {"keys"}:
        for a, b in zip(jax.tree.leaves(again[path]), jax.tree.leaves(tree[path]), strict=True):
            assert_same_bits(a, b)
    assert seen["nest"] == ((3, 16, 24), np.float32) and seen["codes"] == ((16, 24), jnp.int4)
    spread = {path: len(again[path].sharding.device_set) for path in ("flags", "complex", "keys", "whole")}
    assert spread == {"flags": 8, "complex": 8, "keys": 8, "whole": 1}
    for node in (again["nest"].values.codes, again["gaps"].mask, again["thirds"].codes):
        assert not node.sharding.is_fully_replicated


def test_a_sharding_that_does_not_divide_is_refused(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    jc.save(tmp_path / "x", {"a": {"b": W}})
    rule = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    with pytest.raises(StorageError, match=r"a/b: found the sharding .* expected one that divides"):
        jc.load(tmp_path / "x", sharding=lambda path, x: rule)


# What the file says.


def test_the_manifest_is_readable_and_holds_the_plan(tmp_path):
    params = {"a": {"kernel": W, "bias": jnp.zeros(3)}, "b": {"kernel": W, "bias": jnp.zeros(3)}}
    plan = jc.plan(params, [(".*/kernel", METHODS["mask, codebook"])])
    jc.save(tmp_path / "x", jc.compress(params, plan), plan=plan, metadata={"epochs": 3, "note": ["é"]})
    header, text = (tmp_path / "x").read_bytes().split(b"\n")[:2]
    assert header.startswith(b"jcompress 1 ")
    read = json.loads(text)
    assert read["plan"] == {"chain(Magnitude(sparsity=0.8), KMeans(clusters=5))": ["a/kernel", "b/kernel"]}
    assert read["metadata"] == {"epochs": 3, "note": ["é"]}
    assert (read["jcompress"], read["jax"]) == (jc.__version__, jax.__version__)
    assert read["tree"]["a"]["bias"] == "float32[3]"
    values = {"$": "Codebook", "indices": "uint8[32,12]", "codebook": "float32[5]", "clusters": 5}
    assert read["tree"]["a"]["kernel"]["values"] == values
    found = inspect(tmp_path / "x")
    assert found == {**read, "format_version": 1, "payload_bytes": payload_bytes(tmp_path / "x")}


def test_the_manifest_is_small(tmp_path):
    params = {f"layer{i}": {"kernel": W, "bias": jnp.zeros(12)} for i in range(8)}
    rules = [(".*/bias", Q.Float()), (".*", METHODS["mask, codebook, bfloat16"])]
    small = jc.compress(params, jc.plan(params, rules))
    size = jc.save(tmp_path / "x", small)
    assert size - payload_bytes(tmp_path / "x") < 120 * len(jax.tree.leaves(small))


def test_summary(tmp_path, capsys):
    tree = {"w": METHODS["mask, integers"](W), "t": (1, [2.5]), "p": Point(jnp.ones(2), None), 3: "x", "none": {}}
    jc.save(tmp_path / "x", tree, plan={"w": METHODS["int4"]}, metadata={"a": 1})
    assert cli.main(["inspect", str(tmp_path / "x"), str(tmp_path / "missing")]) == 2
    out, err = capsys.readouterr()
    assert "w      Masked(values=Quantized(codes=uint8[32,12], scale=float32[1,12], " in out
    assert 'metadata: {"a": 1}' in out
    assert "plan: Int(bits=4): w" in out
    assert "p/x    float32[2]" in out
    assert "there is no such file" in err


# Formats of one's own.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Shifted(jc.Compressed):
    values: Any
    by: float = dataclasses.field(default=1.0, metadata={"static": True})
    name: str = dataclasses.field(default="s", metadata={"static": True})
    more: Any = dataclasses.field(default=(), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key=None):
        return self.values + self.by


def test_a_format_of_ones_own(tmp_path):
    more = (1, ("two", None, True), np.dtype("int8"), jnp.dtype("bfloat16"), 1.0)
    node = jc.formats.Masked(values=Shifted(W, by=2.0, name="float32[3]", more=more), mask=W > 0)
    jc.save(tmp_path / "x", {"w": node})
    with pytest.raises(StorageError, match=r"format 'Shifted' is unknown; pass formats=\{'Shifted': its class\}"):
        jc.load(tmp_path / "x")
    again = jc.load(tmp_path / "x", formats={"Shifted": Shifted})["w"]
    assert jax.tree.structure(again) == jax.tree.structure(node)
    assert list(map(type, again.values.more)) == list(map(type, more))
    assert_same_bits(again.materialize(), node.materialize())


def test_a_class_that_takes_the_name_of_a_format_is_refused(tmp_path):
    masked = dataclasses.make_dataclass("Masked", [("values", Any)], bases=(jc.Compressed,), frozen=True)
    with pytest.raises(StorageError, match=r"w: this Masked is not jcompress\.formats\.Masked; rename the class"):
        jc.save(tmp_path / "x", {"w": jax.tree_util.register_dataclass(masked)(W)})


@jax.tree_util.register_pytree_with_keys_class
class Loose:
    """A container whose keys may differ by type alone."""

    def __init__(self, items):
        self.items = items

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey(k), x) for k, x in self.items.items()], tuple(self.items)

    @classmethod
    def tree_unflatten(cls, keys, children):
        return cls(dict(zip(keys, children, strict=True)))


# Refusals when saving: nothing is written.


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": object()}}, "a/b: found object, expected an array"),
        ({"a": np.array(["x"])}, "a: found dtype <U1, expected numbers"),
        ({"a": np.array([None])}, "a: found dtype object, expected numbers"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "a: found ShapeDtypeStruct, expected an array with values"),
        ({"a": {(1, 2): jnp.ones(1)}}, r"a: found the key \(1, 2\), expected text or an integer"),
        ({"a": Shifted(W, more=len)}, "a/more: found the static value <built-in function len>, expected numbers"),
        (
            {"a": jc.formats.Quantized(codes=jnp.full((2, 2), 9, jnp.int8), scale=jnp.ones((1, 2)), bits=4)},
            "a/codes: found values from 9 to 9, expected -8 to 7, which fit in 4 bits",
        ),
        ({"a": Loose({1: jnp.ones(1), "1": jnp.ones(1)})}, "a/1: two leaves of this Loose have one path"),
    ],
)
def test_what_cannot_be_saved(tmp_path, tree, message):
    with pytest.raises(StorageError, match=message):
        jc.save(tmp_path / "x", tree)
    assert list(tmp_path.iterdir()) == []


def test_inside_jit_there_is_nothing_to_save(tmp_path):
    with pytest.raises(StorageError, match="expected an array with values"):
        jax.jit(lambda x: jc.save(tmp_path / "x", {"w": x}))(W)


@pytest.mark.parametrize("metadata", [object(), {"x": math.nan}, {"x": jnp.ones(1)}])
def test_metadata_that_json_cannot_hold(tmp_path, metadata):
    with pytest.raises(StorageError, match="metadata: JSON cannot hold it"):
        jc.save(tmp_path / "x", {}, metadata=metadata)


# Damage.


@pytest.fixture
def saved(tmp_path):
    params = {"kernel": W[:16], "bias": jnp.ones(3)}
    small = jc.compress(params, jc.plan(params, [("kernel", METHODS["mask, integers"])]))
    jc.save(tmp_path / "x", small)
    return tmp_path / "x"


def test_a_file_cut_short_anywhere_is_refused(saved):
    data = saved.read_bytes()
    for end in range(len(data)):
        saved.write_bytes(data[:end])
        with pytest.raises(StorageError):
            jc.load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(StorageError, match=f"found {len(data) + 1} bytes, expected {len(data)}"):
        jc.load(saved)


@pytest.mark.parametrize("flip", [0x01, 0x10, 0x20, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_is_refused(saved, flip):
    data = saved.read_bytes()
    for at in range(len(data)):
        saved.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        with pytest.raises(StorageError):
            jc.load(saved)


def test_what_is_no_file_of_ours(tmp_path):
    with pytest.raises(StorageError, match="there is no such file; check the path"):
        jc.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "x")
    for data in (b"", b"\n", b"PK\x03\x04" + bytes(500), b"jcompress", b"jcompress one two\n"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(StorageError, match="found no header, expected a file"):
            jc.load(tmp_path / "x")


def test_a_format_version_of_the_future(saved):
    saved.write_bytes(saved.read_bytes().replace(b"jcompress 1 ", b"jcompress 2 ", 1))
    with pytest.raises(StorageError, match="found format version 2, expected 1; install the jcompress that wrote it"):
        jc.load(saved)
    saved.write_bytes(b"jcompress 7 with another header altogether")
    with pytest.raises(StorageError, match="found format version 7, expected 1"):
        inspect(saved)


def forge(path, change):
    """Rewrite the manifest, with checksums that agree."""
    _, text, payload = path.read_bytes().split(b"\n", 2)
    about = json.loads(text)
    text = json.dumps(change(about) or about).encode() + b"\n"
    digest = [hashlib.blake2b(part, digest_size=8).hexdigest() for part in (text, payload)]
    path.write_bytes(f"jcompress 1 {len(text)} {digest[0]} {len(payload)} {digest[1]}\n".encode() + text + payload)


FORGERIES = {
    "more entries": lambda a: a["tree"].update(bias="float32[300]"),
    "fewer entries": lambda a: a["tree"].update(bias="float32[1]"),
    "wider entries": lambda a: a["tree"].update(bias="complex64[3]"),
    "endless": lambda a: a["tree"].update(bias="float32[99999999999999]"),
    "one leaf less": lambda a: a["tree"].pop("bias") and None,
    "one leaf more": lambda a: a["tree"].update(more="bool[9]"),
    "no dtype": lambda a: a["tree"].update(bias="float33[3]"),
    "no array": lambda a: a["tree"].update(bias="three floats"),
    "no key": lambda a: a["tree"].update(bias="key<dice>[3]"),
    "another shape of mask": lambda a: a["tree"]["kernel"].update(mask="bool[16,11]"),
    "another code": lambda a: a["tree"]["kernel"].update(mask="bool[16,12] gaps 1x96 of [8,12]"),
    "no code": lambda a: a["tree"]["kernel"].update(mask="bool[16,12] wavelets"),
    "half a code": lambda a: a["tree"]["kernel"].update(mask="bool[16,12] choice"),
    "other bits": lambda a: a["tree"]["kernel"]["values"].update(bits=4),
    "too many bits": lambda a: a["tree"]["kernel"]["values"].update(bits=40),
    "bits as text": lambda a: a["tree"]["kernel"]["values"].update(bits="three"),
    "unknown field": lambda a: a["tree"]["kernel"].update(scale="float32[1]"),
    "missing field": lambda a: a["tree"]["kernel"].pop("mask") and None,
    "unknown format": lambda a: a["tree"]["kernel"].update({"$": "Wavelet"}),
    "not a format": lambda a: a["tree"]["kernel"].update({"$": "__doc__"}),
    "unknown kind": lambda a: a["tree"].update(bias={"$frozenset": []}),
    "no tree": lambda a: a.pop("tree") and None,
    "no object": lambda a: [1],
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_manifest_that_disagrees_with_the_payload(saved, name):
    forge(saved, lambda about: None)
    jc.load(saved)
    forge(saved, FORGERIES[name])
    with pytest.raises(StorageError, match=r"manifest|format 'Wavelet' is unknown|format '__doc__' is unknown"):
        jc.load(saved)


# The wrong structure.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "extra": jnp.ones(1)}, r"wrong structure: .* expected but not stored \['extra'\]"),
        (lambda t: {"bias": t["bias"]}, r"wrong structure: stored but not expected \['kernel'\]"),
        (lambda t: {**t, "bias": t["bias"].astype(jnp.int32)}, r"bias: found float32\[3\], expected int32\[3\]"),
        (lambda t: {**t, "bias": jnp.ones(4)}, r"bias: found float32\[3\], expected float32\[4\]; nothing is cast"),
        (lambda t: {**t, "bias": 1.0}, r"bias: found float32\[3\], expected float;"),
        (lambda t: {**t, "bias": None}, r"stored but not expected \['bias'\]"),
        (
            lambda t: {**t, "kernel": W[:15]},
            r"kernel: found Masked\(.* for float32\[16,12\], expected float32\[15,12\];",
        ),
        (lambda t: {**t, "kernel": W[:16].astype("bfloat16")}, r"found .* for float32\[16,12\], expected bfloat16"),
        (lambda t: {**t, "bias": t["kernel"]}, r"bias: found float32\[3\], expected Masked\(.* for float32\[16,12\];"),
        (lambda t: {**t, "kernel": t["kernel"].values}, r"kernel: found Masked\(.*, expected Quantized"),
        (
            lambda t: {**t, "kernel": dataclasses.replace(t["kernel"], mask=jnp.ones((16, 1), bool))},
            r"kernel/mask: found bool\[16,12\], expected bool\[16,1\]",
        ),
        (
            lambda t: {
                **t,
                "kernel": dataclasses.replace(t["kernel"], values=dataclasses.replace(t["kernel"].values, bits=4)),
            },
            r"kernel: found .*bits=3.*, expected .*bits=4",
        ),
    ],
)
def test_restoring_into_the_wrong_structure(saved, change, message):
    with pytest.raises(StorageError, match=message):
        jc.load(saved, like=change(jc.load(saved)))


# Atomic.


def test_an_exception_in_the_middle_of_writing_leaves_the_old_file(saved):
    old, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # as a full disk would
    try:
        with pytest.raises(OSError, match="File too large"):
            jc.save(saved, {"w": np.ones(1 << 19, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        jc.save(tmp_path / "no" / "x", {})


KILLED = """
import sys, os, signal, threading, numpy as np, jcompress as jc
folder = os.path.dirname(sys.argv[1])
def watch():
    while not any(name.endswith(".tmp") and os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
jc.save(sys.argv[1], {"w": np.ones(1 << 25, np.float32)})
"""


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(saved):
    old = saved.read_bytes()
    run = subprocess.run([sys.executable, "-c", KILLED, str(saved)], timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL
    assert saved.read_bytes() == old
    jc.load(saved)
    jc.save(saved, {"w": W})
    assert_same_bits(jc.load(saved)["w"], W)


def test_links_and_permissions(tmp_path):
    real = tmp_path / "folder" / "real"
    real.parent.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    jc.save(link, {"w": W})
    assert link.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert real.stat().st_mode & 0o777 == 0o666 & ~umask
    assert_same_bits(jc.load(pathlib.Path(link))["w"], W)


def test_manifest_texts_of_arrays():
    assert manifest.array_spec(W) == "float32[32,12]"
    assert manifest.placeholder("key<rbg>[2]").array.shape == (2, 4)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_nodes_of_narrow_floats_are_read_into_a_dense_tree(dtype, tmp_path, rng):
    w = {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32).astype(dtype), "b": jnp.ones(3, dtype)}
    small = jc.compress(w, jc.plan(w, [("w", jc.factorize.SVD(rank=3))]))
    jc.save(tmp_path / "x", small)
    for like in (w, jax.eval_shape(lambda w: w, w)):
        again = jc.load(tmp_path / "x", like=like)
        assert again["w"].dtype == jnp.bfloat16 and again["b"].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(jc.materialize(again)["w"], jc.materialize(small)["w"])
    for other in ("float16", "float32", "int8"):
        with pytest.raises(jc.io.StorageError, match="w: found LowRank.* for bfloat16.*expected " + other):
            jc.load(tmp_path / "x", like={"w": jnp.ones((16, 8), other), "b": w["b"]})
