"""Entropy-coded files: bit for bit, as small as their models promise, and as safe as files that are not coded."""

import json
import random
import subprocess
import sys
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jcompress as jc
from jcompress.io import StorageError, inspect
from jcompress.numeric import coding, headers, models, tables
from jcompress.numeric.grids import grid_of
from tests.test_storage_hostile import TREES, W, digest, forged, masked, mutated, opened, refused, sealed


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def codes(w, bits=8):
    top = (1 << bits - 1) - 1
    return np.rint(w).clip(-top - 1, top).astype(np.int8)


SIGNS = np.sign(np.sin(np.cumsum(normal(160, 160), 0) / 3))
MASK = normal(160, 160) * np.exp(normal(1, 160, seed=1)) > 1
KEPT = np.abs(np.cumsum(normal(160, 160, seed=2), 0)) % 6 < 4 * (np.arange(160) % 8 < 3)[:, None]
IMAGES = codes(KEPT * (1 + 2 * np.abs(normal(160, 160, seed=3))))  # a pruned layer on images: rows that have most, runs
ARRAYS = {
    "one table": (codes(20 * normal(160, 160)), 8),
    "narrow": (codes(2 * normal(160, 160), 4), 4),
    "int4": (codes(2 * normal(160, 160), 4).astype(jnp.int4), 4),
    "rows": (codes(5 * normal(160, 160) * np.exp(normal(160, 1, seed=1))), 8),
    "columns": (codes(5 * normal(160, 160) * np.exp(normal(1, 160, seed=1))), 8),
    "above": (codes(SIGNS * np.abs(5 * normal(160, 160))), 8),
    "left": (codes(SIGNS * np.abs(5 * normal(160, 160))).T.copy(), 8),
    "above in rows": (IMAGES, 8),
    "left in columns": (IMAGES.T.copy(), 8),
    "above in wide rows": (np.concatenate([IMAGES, IMAGES[:, ::-1]], 1), 8),
    "mask": (MASK, 1),
    "many symbols": (np.random.default_rng(0).geometric(1e-3, 20_000).astype(np.uint16), 16),
    "gaps": (np.random.default_rng(0).geometric(0.05, 20_000).astype(np.uint16), 10),
    "float16": (normal(120, 100).astype(np.float16), 16),
    "bfloat16": (normal(120, 100).astype(jnp.bfloat16), 16),
    "float32": (normal(120, 100).astype(np.float32), 32),
    "float64": (normal(20, 100), 64),
    "float8": (normal(240, 200).astype(jnp.float8_e4m3fn), 8),
    "short mantissas": (normal(120, 100).astype(jnp.bfloat16).astype(np.float32), 32),
    "zeros": (np.where(MASK, normal(160, 160), 0).astype(np.float32), 32),
    "negative zeros": (np.where(MASK, normal(160, 160), -0.0).astype(np.float32), 32),
    "infinities": (np.array([np.nan, np.inf, -np.inf, 1e-45, -0.0] * 100, np.float32), 32),
    "complex64": ((normal(40, 10) + 1j).astype(np.complex64), 64),
    "words": (np.random.default_rng(0).integers(0, 1 << 32, 3000, np.uint32), 32),
    "wide": (np.random.default_rng(0).integers(-(1 << 63), 1 << 63, 3000, np.int64), 64),
    "widest": (np.array([0, (1 << 64) - 1] * 20 + [5] * 200, np.uint64), 64),
    "few": (np.arange(3, dtype=np.int8), 8),
    "constant": (np.full((50, 50), -3, np.int8), 3),
    "one": (np.ones(1, np.float32), 32),
    "empty": (np.zeros((0, 4), np.float32), 32),
    "no bits": (np.zeros(9, np.uint32), 0),
}


def coded_parts(path):
    """The manifest and the payload of a coded file."""
    header, _, rest = path.read_bytes().partition(b"\n")
    size = int(header.split()[2])
    return json.loads(zlib.decompress(rest[:size])), rest[size:]


def coded(x, width, where=None):
    grid = grid_of(x.shape, where)
    flat = x if where is None else x[where]
    stream = coding.encode(flat, width, grid)
    again, used = coding.decode(memoryview(stream + b"what follows"), flat.size, width, np.dtype(x.dtype), grid)
    assert used == len(stream)
    assert again.dtype == x.dtype
    assert again.tobytes() == np.ascontiguousarray(flat).tobytes()
    return stream


@pytest.mark.parametrize("name", ARRAYS)
def test_numbers_come_back_bit_for_bit(name):
    x, width = ARRAYS[name]
    assert len(coded(x, width)) <= -(-x.size * width // 8) + 1
    if x.ndim == 2 and x.size:
        coded(x, width, np.arange(x.size).reshape(x.shape) % 3 > 0)
        coded(x, width, np.zeros(x.shape, bool))


@pytest.mark.parametrize("name", ["one table", "narrow", "mask", "gaps", "float8", "rows", "columns", "above", "left"])
def test_within_a_hundredth_of_the_entropy_of_the_model(name):
    """The bytes against the entropy of each class by SciPy; models that use structure beat that of one table."""
    x, width = ARRAYS[name]
    stream = coded(x, width)
    one = _entropy_bytes(x.reshape(-1).view(np.uint8 if x.itemsize == 1 else x.dtype))
    kind = {"rows": models.ROWS, "columns": models.COLUMNS, "above": models.ABOVE, "left": models.LEFT}
    if name in kind:
        assert stream[0] >> 5 == kind[name]
        assert len(stream) < 0.97 * one
    elif name == "mask":
        assert len(stream) < one
    else:
        assert stream[0] >> 5 == models.ONE
        assert one <= len(stream) < 1.01 * one
    if name in ("above", "left"):
        _, model = models.choose(
            (x if name == "above" else x.T).reshape(-1).astype(np.int32) + 128, 256, grid_of(x.shape)
        )
        y = (x if name == "above" else x.T).astype(np.int32) + 128
        classes = models.relative(y[:-1], model.centre, model.reach)
        own = sum(_entropy_bytes(y[1:][classes == c]) for c in range(len(model.tables))) + _entropy_bytes(y[0])
        assert len(stream) < 1.02 * own  # among 25,600 codes tables take the second hundredth


@pytest.mark.parametrize(("name", "kind"), [("above in rows", "ABOVE"), ("left in columns", "LEFT")])
def test_the_number_before_within_classes_of_rows(name, kind):
    """Less than either alone takes, and what each class's entropy says but for tables."""
    x, width = ARRAYS[name]
    stream, turned = coded(x, width), x if name.startswith("above") else x.T
    assert stream[0] >> 5 == getattr(models, kind)
    y = np.ascontiguousarray(turned).reshape(-1).astype(np.int32)
    y -= y.min()
    _, model = models.choose(y, int(y.max()) + 1, grid_of(turned.shape))
    assert model.labels.size == len(turned) and model.rows > 1
    y = y.reshape(turned.shape)
    before = models.relative(np.concatenate([np.full_like(y[:1], model.centre), y[:-1]]), model.centre, model.reach)
    both = model.rows * before + model.labels[:, None]
    own = {
        alone: sum(_entropy_bytes(y[c == i]) for i in np.unique(c)) for alone, c in (("before", before), ("both", both))
    }
    assert own["both"] < len(stream) < 0.95 * own["before"]


def _entropy_bytes(x):
    counts = np.unique(x, return_counts=True)[1]
    return counts.sum() * scipy.stats.entropy(counts, base=2) / 8


@pytest.mark.parametrize("kind", ["rows", "columns", "above", "left", "one"])
def test_what_is_counted_by_the_rest_is_counted_right(kind, monkeypatch):
    """Of an array that is mostly one number only the others are counted; nothing changes where all are."""
    rng = np.random.default_rng(0)
    size = np.repeat([1.0, 8.0], 40)
    x = np.rint(rng.normal(size=(80, 60)) * 3 * (rng.random((80, 60)) < 0.08))
    if kind in ("rows", "columns"):
        x *= size[:, None]
    if kind in ("above", "left"):
        x = np.sign(x) * np.abs(rng.normal(0, 4, x.shape).round()) * (x != 0)
        x[1:] += np.where(x[1:] == 0, np.rint(0.8 * x[:-1]), 0)
    x = np.clip(x.T if kind in ("columns", "left") else x, -120, 120).astype(np.int8)
    assert (x == 0).mean() > 0.75
    grid = grid_of(x.shape)
    few = coding.encode(x, 8, grid)
    rows, columns = models._histograms(x.reshape(-1).view(np.uint8) + np.uint8(120), 241, grid)
    np.testing.assert_array_equal(rows.sum(1), 1.0 * x.shape[1])
    np.testing.assert_array_equal(columns.sum(1), 1.0 * x.shape[0])
    monkeypatch.setattr(models, "_few", lambda there, grid: (grid, slice(None)))
    assert coding.encode(x, 8, grid) == few


def test_tables_are_read_as_they_were_written_and_have_frequencies_near_the_counts():
    counts = np.random.default_rng(0).integers(0, 3000, 40) * (np.arange(40) % 7 > 0)
    every = tables.fit_tables(np.stack([counts, counts // 3 + 1, 0 * counts, counts]))
    first, second, *_ = every
    sizes = []
    for own in ([first], [second, first], [first, second], every):
        writer = headers.HeaderWriter()
        tables.write_tables(own, writer)
        data, before = writer.getvalue(), None
        sizes.append(len(data))
        reader = headers.HeaderReader(memoryview(data))
        for table in own:
            before = tables.read_table(40, before, reader)
            np.testing.assert_array_equal(before.frequencies, table.frequencies)
    assert sizes[2] < 1.7 * sizes[0]  # of the second table only what differs
    there = counts > 0
    np.testing.assert_array_equal(first.frequencies > 0, there)
    shares = first.frequencies[there] / first.frequencies.sum() / (counts[there] / counts.sum())
    assert np.abs(np.log2(shares)).max() < 0.6 / first.steps + 0.02
    fine = tables.fit_tables(100_000 * counts[None])[0]
    np.testing.assert_allclose(fine.frequencies / fine.frequencies.sum(), counts / counts.sum(), rtol=0.012)


def test_bfloat16_takes_two_thirds():
    """Exponents of normal weights have 2.5 bits of entropy; signs and mantissas take eight."""
    x = jax.random.normal(jax.random.key(0), (300, 200), jnp.bfloat16)
    assert jc.nbits({"w": x}, coded=True) <= 0.664 * jc.nbits({"w": x})


# Files.

SMALL = {
    "codes": jc.quantize.Int(bits=4)(W),
    "pruned": jc.chain(jc.prune.Magnitude(sparsity=0.9), jc.quantize.Int(bits=4))(jnp.tile(W, (4, 5))),
    "dense": jnp.tile(W, (4, 5)).astype(jnp.bfloat16),
    "bias": jnp.arange(3.0),
    "step": np.int32(3),
    "empty": jnp.zeros((0, 3)),
}


@pytest.mark.parametrize("name", [*TREES, "small"])
def test_files_come_back_and_take_what_nbits_says(tmp_path, name):
    tree = {**TREES, "small": SMALL}[name]
    size = jc.save(tmp_path / "x", tree, coded=True, metadata=[1])
    again, found = jc.load(tmp_path / "x"), inspect(tmp_path / "x")
    assert (found["coded"], found["metadata"]) == (True, [1])
    assert 8 * found["payload_bytes"] == jc.nbits(tree, coded=True)
    assert size == (tmp_path / "x").stat().st_size
    jc.save(tmp_path / "plain", tree)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(jc.load(tmp_path / "plain")), strict=True):
        assert (getattr(x, "dtype", type(x))) == (getattr(y, "dtype", type(y)))
        if hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    jc.load(tmp_path / "x", like=jax.eval_shape(lambda: jc.materialize(SMALL)) if name == "small" else None)


def test_a_pruned_layer_takes_the_entropy_of_its_mask_and_codes(tmp_path):
    w = jax.random.normal(jax.random.key(1), (400, 300))
    node = jc.chain(jc.prune.Magnitude(sparsity=0.95), jc.quantize.Int(bits=4))(w)
    kept = np.asarray(node.values.codes)[np.asarray(node.mask)]
    expected = _entropy_bytes(np.asarray(node.mask)) + _entropy_bytes(kept) + 4 * 300
    assert jc.nbits({"w": node}, coded=True) / 8 < 1.01 * expected
    assert jc.nbits({"w": node}, coded=True) < jc.nbits({"w": node})


STREAM = "467831fac9b036025a360aece8ffb7024225b889449526cfcf027cca574fd1616a4b85be049aeabff8a711fb1a42594bc702"


def test_the_same_bytes_everywhere():
    """A stream that was written once: what any machine reads from it, and writes again."""
    x = np.repeat((np.arange(40) ** 2 % 7 - 3).astype(np.int8).reshape(8, 5), 4, 1)
    assert coded(x, 4).hex() == STREAM
    again, _ = coding.decode(memoryview(bytes.fromhex(STREAM)), 160, 4, np.dtype(np.int8), grid_of((8, 20)))
    np.testing.assert_array_equal(again.reshape(8, 20), x)


WITHOUT = """
import sys
sys.modules["constriction"] = None
import jcompress as jc, jax.numpy as jnp
plain = jc.load(sys.argv[2])
for act in (lambda: jc.load(sys.argv[1]), lambda: jc.save(sys.argv[3], plain, coded=True),
            lambda: jc.nbits(plain, coded=True)):
    try:
        act()
    except ImportError as error:
        print(type(error).__mro__[1].__name__, error)
"""


def test_without_the_coder_the_extra_is_named_and_nothing_is_written(tmp_path):
    paths = [tmp_path / "coded", tmp_path / "plain", tmp_path / "none"]
    jc.save(paths[0], SMALL, coded=True)
    jc.save(paths[1], SMALL)
    told = subprocess.run([sys.executable, "-c", WITHOUT, *paths], capture_output=True, text=True, check=True).stdout
    lines = told.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("StorageError") and "jcompress[coded]" in line for line in lines)
    assert str(paths[0]) in lines[0]
    assert not paths[2].exists()


def test_shapes_have_no_coded_size():
    with pytest.raises(StorageError, match="w: found ShapeDtypeStruct, expected an array with values"):
        jc.nbits({"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, coded=True)


# Damage.


@pytest.mark.parametrize("name", ["masks", "nests", "containers", "small"])
def test_any_payload_is_refused_or_means_something_in_little_memory(tmp_path, name):
    tree, chance, path = {**TREES, "small": SMALL}[name], random.Random(name), tmp_path / "x"
    jc.save(path, tree, coded=True)
    about, payload = coded_parts(path)
    outcomes = set()
    for turn in range(60):
        other, what = bytearray(payload), about
        if turn % 5 == 0:
            what = mutated(about, chance)
        elif turn % 5 == 1:
            del other[chance.randrange(len(other)) :]
        else:
            for _ in range(chance.randint(1, 4)):
                other[chance.randrange(len(other))] = chance.randrange(256)
        path.write_bytes(sealed(json.dumps(what).encode(), bytes(other)))
        tracemalloc.start()
        try:
            jc.load(path, max_bytes=1 << 20)
            outcomes.add("loaded")
        except StorageError as error:
            outcomes.add("refused")
            assert str(path) in str(error)
            assert len(str(error)) < 1000
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 48 << 20
    assert "refused" in outcomes


@pytest.mark.parametrize(
    "tree",
    [
        masked("4,4", "gaps 5x99999999999"),
        masked("4,4", "gaps 1x9999999"),
        "float32[99999999999]",
        masked("25000,25000", "bits of [1,1]"),
        "float32[1000000]",
    ],
)
def test_claims_are_weighed_before_anything_is_allocated(tmp_path, tree):
    refused(tmp_path / "x", forged(tree, b"\x20" + bytes(7), coded=True))


def test_any_change_of_a_byte_is_noticed(tmp_path):
    jc.save(tmp_path / "x", SMALL, coded=True)
    data, chance = (tmp_path / "x").read_bytes(), random.Random(0)
    for _ in range(60):
        at = chance.randrange(len(data))
        (tmp_path / "x").write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
        with pytest.raises(StorageError, match=str(tmp_path)):
            jc.load(tmp_path / "x")


def test_a_plain_file_is_no_coded_one(tmp_path):
    jc.save(tmp_path / "x", {"w": jnp.arange(6.0)})
    about, payload = opened((tmp_path / "x").read_bytes())
    for coded, told in ((True, "manifest disagrees"), (3, "no truth value for 'coded'")):
        refused(tmp_path / "x", sealed(json.dumps({**about, "coded": coded}).encode(), payload), told)


def test_what_is_shared_is_coded_once(tmp_path):
    w = jax.random.normal(jax.random.key(0), (64, 32))
    tied = jc.tie({"embed": w, "head": w.T}, {"head": "embed"}, transpose=("head",))
    plan = jc.plan(tied, [("embed", jc.quantize.Int(bits=4)), (".*", None)])
    small = jc.compress(tied, plan)
    assert jc.nbits(small, coded=True) == jc.nbits({"embed": small["embed"]}, coded=True)
    jc.save(tmp_path / "x", small, coded=True)
    again = jc.materialize(jc.load(tmp_path / "x"))
    np.testing.assert_array_equal(again["head"], again["embed"].T)
    report = jc.report(tied, small, coded=True)
    assert report.total.coded_bytes == jc.nbits(small, coded=True) / 8


def test_manifests_that_swell_are_refused(tmp_path):
    text = zlib.compress(b'{"jcompress":"0","jax":"0","tree":"' + b"9" * (1 << 24) + b'"}', 9)
    header = b"jcompress 1 %d %s 0 %s\n" % (len(text), digest(text), digest(b""))
    refused(tmp_path / "x", header + text, "found a manifest of more than 1")
    text = text[:500]
    refused(tmp_path / "x", b"jcompress 1 %d %s 0 %s\n" % (len(text), digest(text), digest(b"")) + text)
    text = b"x" + text
    refused(tmp_path / "x", b"jcompress 1 %d %s 0 %s\n" % (len(text), digest(text), digest(b"")) + text, "is damaged")
