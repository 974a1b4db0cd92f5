"""Codebooks and computed codes run as they are: the same numbers, less memory, and a reason where they are dense."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.formats import Codebook, Coded, Masked, Rotated
from jcompress.formats.arranged import restored

Layout = jc.Layout


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def words(*shape, block=(8, 1), layers=0, seed=0):
    """A codebook of 16 random words, or one for each of the stacked layers."""
    whole = len(shape) - len(block)
    counts = (*shape[:whole], *(n // b for n, b in zip(shape[whole:], block, strict=True)))
    indices = jnp.asarray(np.random.default_rng(seed).integers(0, 16, counts), jnp.uint8)
    row = [math.prod(block)] if block else []
    return Codebook(indices, array(*shape[:layers], 16, *row) / 12, 16, len(shape) - layers, block)


def lattice(*shape):
    codes = np.random.default_rng(0).integers(0, 1 << 16, (*shape[:-2], shape[-2] // 8, shape[-1]))
    return Coded(jnp.asarray(codes, jnp.uint16), array(*[1] * (len(shape) - 1), shape[-1]) / 12, "e8p")


def trellis(inputs, outputs):
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 4, (inputs, outputs)), jnp.uint8)
    return Coded(codes, array(1, outputs), "3inst", 2, 6, (8, 6))


def rotated(node):
    return Rotated(node, array(336, 1) > 0)


def beside(fn, tree, *args):
    """How the products were made, after a comparison with the dense arrays."""
    fast, found = jc.accelerate(fn), []
    got = jax.jit(lambda tree, *args: fast(tree, *args))(tree, *args)
    want = jax.jit(lambda tree, *args: fn(jc.materialize(tree), *args))(tree, *args)
    found = fast.report(tree, *args).rows
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=3e-5 * float(jnp.abs(want).max()))
    return [row.how for row in found]


NODES = {
    "single values": words(336, 252, block=()),
    "words of inputs": words(336, 252),
    "words of outputs": words(336, 252, block=(1, 6)),
    "words of a row": words(336, 252, block=(6,)),
    "squares": words(336, 252, block=(4, 2)),
    "a lattice": lattice(336, 252),
    "a trellis": trellis(336, 252),
    "a rotated lattice": rotated(lattice(336, 252)),
    "rotated words": rotated(words(336, 252)),
}


@pytest.mark.parametrize("name", NODES)
def test_codes_equal_their_dense_array(name):
    node = NODES[name]
    hows = beside(lambda w, x, y: x @ w + (w @ y).sum(), node, array(20, 336, seed=1), array(252, 3, seed=2))
    assert hows[0].startswith("codes, ") and hows[0].endswith("rows made dense at a time")
    assert hows[1].startswith("dense: Rotated" if "rotated" in name else "codes, ")


@pytest.mark.parametrize("lead", [(), (3,), (2, 4)], ids=str)
def test_few_rows_meet_the_words_of_a_codebook(lead):
    def fn(w, x):
        return x @ w, jnp.einsum("io,i...->o...", w, jnp.moveaxis(x, -1, 0)), x.astype(jnp.bfloat16) @ w

    hows = beside(lambda w, x: sum(y.sum() for y in fn(w, x)), words(336, 252), array(*lead, 336, seed=1))
    assert hows == ["partial products of 16 words, looked up"] * 3
    narrow = jc.chain(jc.quantize.Float("bfloat16"), jc.quantize.Float("bfloat16"))(array(16, 8) / 12)
    node = Codebook(words(336, 252).indices, narrow, 16, 2, (8, 1))
    assert beside(lambda w, x: x @ w, node, array(*lead, 336))[0].startswith("partial products")


LAYOUTS = {
    "(out, in)": ((252, 336), Layout(inputs=1, outputs=0), lambda w, x: x @ w.T),
    "heads of outputs": ((336, 18, 14), Layout(0, (1, 2)), lambda w, x: jnp.einsum("bi,iho->bho", x, w)),
    "heads of inputs": ((24, 14, 252), Layout((0, 1), 2), lambda w, x: jnp.einsum("bhd,hdo->bo", split(x), w)),
    "heads turned": ((14, 24, 252), Layout((1, 0), 2), lambda w, x: jnp.einsum("bhd,dho->bo", split(x), w)),
}


def split(x):
    return x.reshape(-1, 24, 14)


@pytest.mark.parametrize("name", LAYOUTS)
def test_leaves_of_other_layouts(name):
    shape, layout, fn = LAYOUTS[name]
    tree = {
        "words": restored(words(336, 252), layout, shape),
        "squares": restored(words(336, 252, block=(4, 6)), layout, shape),
        "values": words(*shape, block=()),
    }
    hows = beside(lambda p, x: jnp.stack([fn(p[k], x) for k in sorted(p)]), tree, array(2, 336, seed=1))
    assert sorted(how.split(",")[0] for how in hows) == ["codes", "codes", "partial products of 16 words"]


STACKED = {
    "words": words(3, 256, 256),
    "words of each": words(3, 256, 256, layers=1),
    "values": words(3, 256, 256, block=()),
    "values of each": words(3, 256, 256, block=(), layers=1),
    "a lattice": lattice(3, 256, 256),
    "arranged": restored(words(3, 256, 256, layers=1), Layout(inputs=1, outputs=0), (256, 256)),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers(name):
    def fn(w, x):
        turned = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        return turned + jnp.einsum("bi,lio->lbo", x, w).sum(0) + x @ w[1].T

    hows = beside(fn, STACKED[name], array(4, 256, seed=1))
    assert hows[0].startswith(("codes", "partial products"))
    assert len(hows) == 3


@pytest.mark.parametrize("name", ["single values", "words of inputs", "words of outputs", "a lattice"])
def test_rows_of_a_table_are_looked_up_as_codes(name):
    node, ids = NODES[name], jnp.array([[3, 335, 8], [0, 77, -600]])

    def fn(table, ids):
        return jnp.take(table, ids, axis=0) + table.at[ids].get(mode="clip")

    compiled = jax.jit(jc.accelerate(fn)).lower(node, ids).compile()
    np.testing.assert_array_equal(compiled(node, ids), fn(node.materialize(), ids))
    assert compiled.memory_analysis().temp_size_in_bytes < 336 * 252


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("name", ["single values", "words of inputs", "a lattice"])
def test_gradients_are_those_of_the_dense_array(rows, name):
    node, x, y = NODES[name], array(rows, 336, seed=1), array(rows, 252, seed=2)
    train, held = jc.split(node)

    def loss(run, train, x):
        return jnp.square(run(jc.merge(train, held), x) - y).sum()

    fast = jc.accelerate(lambda w, x: x @ w)
    found = jax.jit(jax.grad(lambda t, x: loss(fast, t, x), argnums=(0, 1)))(train, x)
    want = jax.grad(lambda t, x: loss(lambda n, x: x @ n.materialize(), t, x), argnums=(0, 1))(train, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_a_table_that_is_read_both_ways():
    tied = jc.tie({"embed": array(1024, 64), "head": array(64, 1024)}, {"head": "embed"}, transpose=("head",))
    small = {**tied, "embed": words(1024, 64, block=(1, 8))}
    (how,) = beside(lambda p, ids: p["embed"][ids] @ p["head"], small, jnp.array([1, 5]))
    assert how.startswith("codes")


@pytest.mark.parametrize("node", [words(1024, 512, block=()), lattice(1024, 512)], ids=["values", "lattice"])
def test_no_dense_copy_is_made(node):
    x = array(20, 1024, seed=1)
    dense, fast = (
        jax.jit(fn).lower(node, x).compile().memory_analysis().temp_size_in_bytes
        for fn in (lambda w, x: x @ w.materialize(), jc.accelerate(lambda w, x: x @ w))
    )
    assert dense >= 4 * 1024 * 512 and fast <= dense / 2


def test_why_it_is_made_dense():
    def convolved(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    node = NODES["words of inputs"]
    assert beside(lambda w, x: x @ w, node, array(500, 336)) == ["dense: Codebook is made dense, for 500 rows"]
    (how,) = beside(lambda w, x: x @ w, words(64, 8), array(3, 64))
    assert how == "dense: Codebook is made dense, for a small weight"
    (how,) = beside(convolved, words(3, 3, 32, 64), array(2, 6, 6, 32))
    assert how == "dense: Codebook is made dense, in a convolution"
    masked = Masked(NODES["single values"], array(336, 252) > 0)
    assert beside(lambda w, x: x @ w, masked, array(3, 336)) == ["dense: Masked is made dense"]
