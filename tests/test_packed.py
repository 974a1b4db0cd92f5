"""Packed trees: the same values in the memory that files take, through every verb."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

METHODS = {
    "int1": jc.quantize.Int(bits=1),
    "int3": jc.quantize.Int(bits=3),
    "int4, groups, zero points": jc.quantize.Int(bits=4, group_size=8, symmetric=False),
    "int6": jc.quantize.Int(bits=6),
    "int8": jc.quantize.Int(bits=8),
    "int12": jc.quantize.Int(bits=12),
    "nf4": jc.quantize.NF4(group_size=8),
    "ternary": jc.quantize.Ternary(),
    "kmeans": jc.share.KMeans(clusters=6),
    "magnitude": jc.prune.Magnitude(sparsity=0.5),
    "2:4 of int4": jc.chain(jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), jc.quantize.Int(bits=4)),
    "svd of int3": jc.chain(jc.factorize.SVD(rank=4), jc.quantize.Int(bits=3)),
    "low rank and int2": jc.residual(jc.factorize.SVD(rank=2), jc.quantize.Int(bits=2)),
    "hashed": jc.share.Hashed(ratio=0.25),
}


def matrix(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("length", [1, 7, 16, 19])
def test_few_bits_are_those_that_numpy_packs(bits, signed, length):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = np.dtype(("int" if signed else "uint") + ("8" if bits <= 8 else "16"))
    x = np.random.default_rng(bits).integers(low, high, (3, length)).astype(dtype)
    packed = jc.formats.Bits.of(jnp.asarray(x), bits)
    np.testing.assert_array_equal(packed.materialize(), x)
    assert packed.materialize().dtype == dtype and packed.data.shape == (3, -(-length // 8), bits)
    rows = np.unpackbits(
        (x.astype(np.int64) & (2**bits - 1)).astype("<u8").view(np.uint8).reshape(3, length, 8),
        axis=-1,
        bitorder="little",
    )
    rows = np.pad(rows[..., :bits].reshape(3, -1), [(0, 0), (0, -length % 8 * bits)])
    np.testing.assert_array_equal(packed.data.reshape(3, -1), np.packbits(rows, axis=-1, bitorder="little"))


@pytest.mark.parametrize("name", METHODS)
def test_packed_nodes_are_the_nodes(name, tmp_path):
    w = matrix(16, 24)
    tree = {"b": jnp.ones(3), "w": METHODS[name](w)}  # in order, as jax.tree.map gives them
    packed = jc.pack(tree)
    same(jc.unpack(packed), tree)
    same(jc.materialize(packed), jc.materialize(tree))
    assert jc.nbits(packed) == jc.nbits(tree)
    assert jc.pack(packed)["w"] is packed["w"]
    assert repr(packed["w"]) and packed["w"].shape == (16, 24)
    jc.save(tmp_path / "a", tree)
    jc.save(tmp_path / "b", packed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    moved = packed["w"].project(w + 0.1)
    same(jc.unpack({"w": moved}), {"w": tree["w"].project(w + 0.1)})
    assert str(jc.report({"w": w}, {"w": packed["w"]}).total) == str(jc.report({"w": w}, {"w": tree["w"]}).total)


@pytest.mark.parametrize(("name", "bits"), [("int1", 1), ("int3", 3), ("nf4", 4), ("int6", 6), ("int12", 12)])
def test_codes_take_their_bits_in_memory(name, bits):
    packed = jc.pack(METHODS[name](matrix(64, 128)))
    assert packed.node.codes.data.nbytes == 64 * 128 * bits // 8


def test_a_mask_takes_one_bit_and_whole_bytes_stay():
    packed = jc.pack(METHODS["magnitude"](matrix(64, 128)))
    assert packed.node.mask.data.nbytes == 64 * 128 // 8
    whole = METHODS["int8"](matrix(8, 8))
    assert jc.pack(whole) is whole and jc.pack(jnp.ones(3)).shape == (3,)


@pytest.mark.parametrize("name", ["int3", "2:4 of int4", "kmeans", "low rank and int2"])
def test_layers_are_sliced_by_scan_and_by_vmap(name):
    stacked = jc.stacked(METHODS[name])(matrix(3, 8, 8))
    packed, x = jc.pack(stacked), matrix(2, 8, seed=1)

    @jax.jit
    def scanned(node, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer.materialize()), None), x, node)[0]

    np.testing.assert_array_equal(scanned(packed, x), scanned(stacked, x))
    each = jax.jit(jax.vmap(lambda node: node.materialize()))
    np.testing.assert_array_equal(each(packed), each(stacked))


@pytest.mark.parametrize("name", ["int4, groups, zero points", "magnitude", "svd of int3", "kmeans"])
def test_packed_trees_are_trained_and_run_as_they_are(name):
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) + params["b"]

    tree, x = {"w": METHODS[name](matrix(16, 24)), "b": jnp.ones(24)}, matrix(4, 16, seed=1)
    packed = jc.pack(tree)
    fast = jax.jit(jc.accelerate(fn))
    np.testing.assert_allclose(fast(packed, x), fast(tree, x), rtol=1e-6, atol=1e-6)
    assert str(jc.accelerate(fn).report(packed, x)) == str(jc.accelerate(fn).report(tree, x))
    assert str(jc.trace.cost(fn, packed, x)) == str(jc.trace.cost(fn, tree, x))

    @jax.jit
    def grads(tree):
        train, held = jc.split(tree)
        return jax.grad(lambda t: jnp.square(fn(jc.materialize(jc.merge(t, held)), x)).sum())(train)

    for a, b in zip(jax.tree.leaves(grads(packed)), jax.tree.leaves(grads(tree)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_tied_leaves_see_through_packing():
    tree = jc.tie(
        {"embed": METHODS["int3"](matrix(16, 8)), "head": matrix(8, 16)}, {"head": "embed"}, transpose=("head",)
    )
    same(jc.materialize(jc.pack(tree)), jc.materialize(tree))
    # Rows that are looked up in a packed table, also of codes that stand for others than themselves.
    read, at = jc.accelerate(lambda p, i: p["embed"][i]), jnp.array([3, 0, 15])
    signs = jc.quantize.Int(bits=1)
    for method in (*METHODS.values(), signs, jc.quantize.NF4(group_size=None), jc.quantize.AdditivePowersOfTwo(bits=4)):
        table = {"embed": method(matrix(16, 8), jc.Context(key=jax.random.key(0)))}
        np.testing.assert_allclose(read(jc.pack(table), at), jc.materialize(table)["embed"][at], rtol=1e-6, atol=1e-6)
    shared = jc.share.KMeans(clusters=4, scope="global")
    params = {"a": matrix(8, 8), "b": matrix(8, 8, seed=1)}
    small = jc.compress(params, jc.plan(params, [(".*", shared)]))
    same(jc.materialize(jc.pack(small)), jc.materialize(small))
    assert jc.nbits(jc.pack(small)) == jc.nbits(small)


def test_shapes_are_packed_too():
    node = METHODS["int3"](matrix(16, 24))
    shapes = jax.eval_shape(lambda: jc.pack(node))
    assert jc.nbits(shapes) == jc.nbits(node) and shapes.shape == (16, 24)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_shards_are_kept():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))
    w = jax.device_put(matrix(16, 64), rows)
    packed = jax.jit(lambda w: jc.pack(METHODS["int3"](w)))(w)
    text = jax.jit(lambda p: p.materialize()).lower(packed).compile().as_text()
    assert "all-gather" not in text
    assert not packed.node.codes.data.sharding.is_fully_replicated
