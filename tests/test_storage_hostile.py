"""Files that are damaged, or made to harm: one sentence that names the file, at once and in little memory."""

import collections
import dataclasses
import hashlib
import json
import os
import random
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.io import StorageError, inspect

W = jax.random.normal(jax.random.key(0), (32, 12))
P, Q, F = jc.prune, jc.quantize, jc.factorize
Point = collections.namedtuple("Point", ["x", "y"])

TREES = {
    "masks": {
        "gaps": P.Magnitude(sparsity=0.9)(W),
        "choice": P.Magnitude(pattern=P.NM(2, 4))(W),
        "rows": jc.formats.Masked(values=W, mask=jnp.arange(32)[:, None] % 3 + jnp.zeros((1, 12)) > 0),
        "none": jc.formats.Masked(values=W, mask=W > 99),
    },
    "nests": {
        "integers": jc.chain(P.Magnitude(sparsity=0.6), Q.Int(bits=3, symmetric=False))(W),
        "groups": Q.Int(bits=3, group_size=8)(W),
        "codebook": jc.chain(P.Magnitude(sparsity=0.8), jc.share.KMeans(clusters=5))(W),
        "sum": jc.residual(Q.Int(bits=4), jc.chain(F.SVD(rank=2), Q.Float()))(W),
        "rotated": Q.Rotation(Q.Int(bits=4))(W),
    },
    "containers": {
        "tuple": (1, [2.5, None, True], Point(W[0], "text"), ()),
        "keys of all kinds": {3: 1, 4: {}},
        "dollars": {"$": jnp.ones(2, jnp.int4), "nan": float("nan"), "complex": complex(1, float("inf"))},
        "keys": jax.random.split(jax.random.key(0), 2),
        "wide": np.arange(3, dtype=np.complex128),
        "mask": W[:3] > 0,
        "empty": jnp.zeros((0, 4)),
    },
}


def digest(data):
    return hashlib.blake2b(data, digest_size=8).hexdigest().encode()


def sealed(text, payload=b""):
    text = text + b"\n"
    return b"jcompress 1 %d %s %d %s\n" % (len(text), digest(text), len(payload), digest(payload)) + text + payload


def forged(tree, payload=b"", **about):
    return sealed(json.dumps({"jcompress": "0", "jax": "0", "tree": tree, **about}).encode(), payload)


def opened(data):
    """The manifest and the payload of a file."""
    _, text, payload = data.split(b"\n", 2)
    return json.loads(text), payload


def refused(path, data, match=".", **options):
    """Loading the file is refused at once, in little memory, in a sentence that names it."""
    path.write_bytes(data)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(StorageError, match=match) as caught:
            jc.load(path, **options)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 20
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def masked(shape, code):
    return {"w": {"$": "Masked", "values": f"float32[{shape}]", "mask": f"bool[{shape}] {code}"}}


def nested(levels, inner, wrap):
    for _ in range(levels):
        inner = wrap(inner)
    return inner


HUGE = {
    "mask of one bit": masked("25000,25000", "bits of [1,1]"),
    "choice of nothing": masked("4000000000,1", "choice 0:2"),
    "choice of all": masked("4000000000,1", "choice 2:2"),
    "gaps of nothing": masked("400000,40000", "gaps 5x0"),
    "many gaps": masked("4,4", "gaps 5x999999999999999999"),
    "one cluster": {
        "w": {"$": "Codebook", "indices": "uint8[999999999,99]", "codebook": "float32[1]", "clusters": 1},
    },
    "array": "float32[99999999999]",
    "overflow": "float32[9999999999,9999999999,9999999999]",
    "no entries": "float32[0,999999999999999999,999999999999999999]",
    "many axes": f"float32[{','.join(['1'] * 2000)}]",
    "long number": f"float32[{'9' * 5000}]",
    "many small ones": ["float32[4000000]"] * 99,
    "keys": "key<fry>[99999999999]",
    "bits": {"w": {"$": "Quantized", "codes": "int8[2,2]", "scale": "float32[1,2]", "bits": 10**12}},
    "axes": {"w": {"$": "Codebook", "indices": "uint8[2,2]", "codebook": "float32[4]", "clusters": 4, "ndim": 10**10}},
    "clusters": {"w": {"$": "Codebook", "indices": "uint8[2,2]", "codebook": "float32[4]", "clusters": 10**4000}},
    "group": {
        "w": {"$": "Quantized", "codes": "int8[2,2]", "scale": "float32[1,2]", "bits": 4, "group_size": 10**18},
    },
    "deep choice": masked("4000000000,1", "choice 2000000000:4000000000"),
    "wide gaps": masked("4,4", "gaps 4000x1"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_few_bytes_that_claim_much_are_refused_at_once(tmp_path, name):
    refused(tmp_path / "x", forged(HUGE[name]))


WRONG = {
    "lists": b'{"jcompress":"0","jax":"0","tree":' + b"[" * 100_000,
    "closed lists": b'{"jcompress":"0","jax":"0","tree":' + b"[" * 800 + b"]" * 800 + b"}",
    "objects": b'{"a":' * 50_000,
    "twice": b'{"jcompress":"0","jax":"0","tree":{"a":1,"a":2}}',
    "nan": b'{"jcompress":"0","jax":"0","tree":NaN}',
    "digits": b'{"jcompress":"0","jax":"0","tree":' + b"9" * 5000 + b"}",
    "no text": b"\xff\xfe\xfd",
    "nothing": b"",
    "versions": b'{"jcompress":0,"jax":"0","tree":1}',
    "plan": b'{"jcompress":"0","jax":"0","tree":1,"plan":{"Int()":3}}',
}


@pytest.mark.parametrize("name", WRONG)
def test_manifests_that_are_none(tmp_path, name):
    refused(tmp_path / "x", sealed(WRONG[name]))
    with pytest.raises(StorageError, match=str(tmp_path)):
        inspect(tmp_path / "x")


SPECS = {
    "deep tuples": (nested(300, 1, lambda x: {"$tuple": [x]}), "256"),
    "deep nodes": (
        nested(300, "float32[2,2]", lambda x: {"$": "Masked", "values": x, "mask": "bool[2,2]"}),
        "expected at most 32; materialize some",
    ),
    "long double": ("float128[3]", "describes no array"),
    "text": ("U99999999[3]", "describes no array"),
    "objects": ("object[3]", "describes no array"),
    "negative": ("float32[-3]", "describes no array"),
    "commas": ("float32[3,,3]", "describes no array"),
    "other digits": ("float32[\u0663]", "describes no array"),
    "code of floats": ("float32[4,1] choice 1:2", "describes no code"),
    "other shape of mask": (masked("4,4", "bits of [2,4]"), "describes no mask of shape"),
    "more axes of mask": (masked("4,4", "bits of [1,4,4]"), "describes no mask of shape"),
    "uneven groups": (masked("6,4", "choice 1:4"), "describes no code"),
    "more of groups": (masked("4,4", "choice 5:4"), "describes no code"),
    "other groups": (masked("6,4", "choice 1:3"), "describes no code"),
    "twice": ({"$dict": [["a", 1], ["a", 2]]}, "a key occurs twice"),
    "pairs": ({"$dict": [["a", 1, 2]]}, "'\\$dict'"),
    "list as key": ({"$dict": [[["a"], 1]]}, "'\\$dict'"),
    "tuple": ({"$tuple": 3}, "'\\$tuple'"),
    "named": ({"$namedtuple": ["a b", {"x": 1}]}, "named tuple that Python refuses"),
    "named field": ({"$namedtuple": ["A", {"_x": 1}]}, "named tuple that Python refuses"),
    "named type": ({"$namedtuple": [3, {"x": 1}]}, "manifest"),
    "two kinds": ({"$tuple": [], "$dict": []}, "in one object"),
    "float": ({"$float": "1e5"}, "'\\$float'"),
    "complex": ({"$complex": [1, {}]}, "manifest"),
    "format": ({"$": ["Masked"]}, "is unknown"),
    "static": ({"$": "Masked", "values": 3, "mask": "bool[2]"}, "describes no array"),
    "dtype": (
        {"$": "Cast", "values": "bfloat16[2]", "stored": {"$dtype": "U999999999"}},
        "the dtype 'U999999999', which this",
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_trees_that_mean_nothing(tmp_path, name):
    spec, match = SPECS[name]
    refused(tmp_path / "x", forged(spec, bytes(8)), match)


MISFITS = {
    "mask": {"$": "Masked", "values": "float32[4,2]", "mask": "bool[4,3]"},
    "mask that would spread": {"$": "Masked", "values": "float32[4,1]", "mask": "bool[4,3]"},
    "values of a node": {
        "$": "Masked",
        "values": {"$": "Quantized", "codes": "int8[4,2]", "scale": "float32[1,2]", "bits": 4},
        "mask": "bool[4,3]",
    },
    "scale": {"$": "Quantized", "codes": "int8[4,2]", "scale": "float32[1,3]", "bits": 4},
    "scale that would spread": {"$": "Quantized", "codes": "int8[4,1]", "scale": "float32[1,3]", "bits": 4},
    "groups": {"$": "Quantized", "codes": "int8[4,2]", "scale": "float32[2,2]", "bits": 4, "group_size": 0},
    "factors": {"$": "LowRank", "u": "float32[4,2]", "v": "float32[3,5]"},
    "terms": {"$": "Sum", "terms": ["float32[4,2]", "float32[4,1]"]},
    "signs": {"$": "Rotated", "values": "float32[4,2]", "signs": "bool[8,1]"},
}


@pytest.mark.parametrize("name", MISFITS)
def test_parts_of_a_node_must_fit_together(tmp_path, name):
    refused(tmp_path / "x", forged({"w": MISFITS[name]}, bytes(64)), "fit together|manifest")


def test_numbers_of_a_choice_and_gaps_beyond_a_mask(tmp_path):
    refused(tmp_path / "x", forged(masked("4,2", "choice 2:4"), b"\xff" * 17), "manifest disagrees")
    refused(tmp_path / "x", forged(masked("4,2", "gaps 4x2"), b"\xee" * 9), "manifest disagrees")


def test_the_limit_can_be_raised_and_lowered(tmp_path):
    node = jc.formats.Masked(values=jnp.zeros((5000, 4000)), mask=jnp.zeros((5000, 4000), bool))
    size = jc.save(tmp_path / "x", {"w": node})
    with pytest.raises(StorageError, match=rf"bytes in memory, expected at most {(64 << 20) + 256 * size} by"):
        jc.load(tmp_path / "x")
    assert jc.load(tmp_path / "x", max_bytes=100_000_000)["w"].shape == (5000, 4000)
    with pytest.raises(StorageError, match="expected at most 99999999"):
        jc.load(tmp_path / "x", max_bytes=99_999_999)
    assert inspect(tmp_path / "x")["tree"]["w"]["$"] == "Masked"
    with pytest.raises(StorageError, match=r"found a manifest of .* bytes, expected at most 10; raise max_bytes"):
        inspect(tmp_path / "x", max_bytes=10)


def test_payloads_are_weighed_before_they_are_read(tmp_path):
    refused(tmp_path / "x", forged({"a": "float32[1000000]"}, bytes(8)), "at least 32000000 bits of 64")


# Whatever the damage.

TEXTS = ["", "$", "float32[2,2]", "bool[2,2] choice 1:2", "float32[99999999,99999999]", "bool[9999999,99999] gaps 3x1"]
TEXTS += [
    "bool[2,2] gaps 1x99999999999",
    "key<fry>[2]",
    "key<rbg>[9999999999]",
    "uint8[0,99999999999]",
    "a\x00b",
    "\ud800",
]
NUMBERS = [0, -1, 1, 2, 7, 64, 65, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e308, True, None]
OBJECTS = [[], {}, [[]], {"$tuple": []}, {"$": "Masked"}, {"$float": "inf"}, {"$dtype": "int8"}, {"$text": "x"}]
OBJECTS += [{"$dict": [[1, 2]]}, {"$namedtuple": ["A", {"x": 1}]}, {"$complex": [1, 2]}, nested(300, 0, lambda x: [x])]


def places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, x in items:
        yield from places(x, (*at, key))


def mutated(about, chance):
    """A manifest with one to three changes anywhere."""
    about = json.loads(json.dumps(about))
    for _ in range(chance.randint(1, 3)):
        *outer, last = chance.choice([at for at in places(about) if at])
        where = about
        for key in outer:
            where = where[key]
        kind = chance.randrange(6)
        if kind == 0:
            del where[last]
        elif kind == 1 and isinstance(where[last], str) and where[last]:
            text, i = where[last], chance.randrange(len(where[last]))
            where[last] = text[:i] + chance.choice("0123456789,[]x: -$") + text[i + chance.randint(0, 1) :]
        elif kind == 2 and isinstance(where, dict):
            where[chance.choice(["$", "w", "bits", "axes", "mask", "values", "ndim", "$tuple"])] = where[last]
        elif kind == 3 and isinstance(where, list):
            where.extend([where[last]] * chance.choice([1, 100]))
        else:
            where[last] = chance.choice(chance.choice([TEXTS, NUMBERS, OBJECTS]))
    return about


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, tree in TREES.items():
        jc.save(folder / name, tree, plan={"w": Q.Int(bits=4)}, metadata={"a": [1]})
    return {name: (folder / name).read_bytes() for name in TREES}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TREES)
def test_any_change_of_a_manifest_is_refused_or_means_something(tmp_path, saved, name, seed):
    about, payload = opened(saved[name])
    chance, loaded = random.Random(f"{name}{seed}"), 0
    for _ in range(80):
        data = sealed(json.dumps(mutated(about, chance)).encode(), payload)
        (tmp_path / "x").write_bytes(data)
        tracemalloc.start()
        try:
            tree = jc.load(tmp_path / "x", max_bytes=1 << 20)
        except StorageError as error:
            assert str(tmp_path) in str(error)
            continue
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 32 << 20
        loaded += 1
        inspect(tmp_path / "x")
        jc.save(tmp_path / "again", tree)
        assert repr(jc.load(tmp_path / "again")) == repr(tree)
    assert loaded < 80


@pytest.mark.parametrize("name", TREES)
def test_any_change_of_bytes_is_refused_or_harmless(tmp_path, saved, name):
    data, chance = saved[name], random.Random(name)
    about, payload = opened(data)
    for _ in range(200):
        at, kind = chance.randrange(len(data)), chance.randrange(3)
        changed = [data[:at], data[:at] + data[at + 1 :], data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]]
        (tmp_path / "x").write_bytes(changed[kind])
        try:
            tree = jc.load(tmp_path / "x")
        except StorageError as error:
            assert str(tmp_path) in str(error)
        else:
            assert changed[kind] == data
            assert jax.tree.structure(tree) == jax.tree.structure(TREES[name])
    for _ in range(20):  # another payload under the right checksum is another tree, or none
        other = bytes(chance.randrange(256) for _ in payload)
        (tmp_path / "x").write_bytes(sealed(json.dumps(about).encode(), other))
        try:
            jc.load(tmp_path / "x")
        except StorageError as error:
            assert "manifest disagrees" in str(error)


def test_an_array_is_no_text_of_a_node(tmp_path):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, repr=False)
    class Named(jc.Compressed):
        values: object
        name: str = dataclasses.field(default="", metadata={"static": True})

    jc.save(tmp_path / "x", {"w": Named(jnp.ones(2), name="float32[99999999999]")})
    again = jc.load(tmp_path / "x", formats={"Named": Named})["w"]
    assert again.name == "float32[99999999999]"
    assert os.path.getsize(tmp_path / "x") < 300
