"""Codes in groups run block by block: the same numbers, less memory, and a reason where they are made dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

Int = jc.quantize.Int


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def beside(fn, node, x):
    """How the products were made, after a comparison with the dense array."""
    fast = jc.accelerate(fn)
    got, want = jax.jit(fast)(node, x), fn(jc.materialize(node), x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * float(jnp.abs(want).max()))
    return [row.how for row in fast.report(node, x).rows]


METHODS = {
    "signed": Int(bits=4, group_size=32),
    "affine": Int(bits=4, group_size=32, symmetric=False),
    "a last group of fewer": Int(bits=4, group_size=48, pad=True),
    "a table": jc.quantize.NF4(group_size=32),
    "narrow floats": jc.quantize.Microscaling("e2m3", group_size=32),
    "blocks": Int(bits=8, block=(16, 16)),
    "one bit": Int(bits=1, group_size=32),
    "masked": jc.chain(jc.prune.Magnitude(sparsity=0.5), Int(bits=4, group_size=32)),
    "masked affine": jc.chain(jc.prune.Magnitude(sparsity=0.5), Int(bits=4, group_size=32, symmetric=False)),
    "scales in 16 bits": jc.chain(Int(bits=4, group_size=32), jc.quantize.Float("bfloat16")),
}


@pytest.mark.parametrize("name", METHODS)
def test_codes_in_groups_equal_their_dense_array(name):
    (how,) = beside(lambda w, x: x @ w, METHODS[name](array(160, 112)), array(6, 160, seed=1))
    assert how.startswith("codes in groups, ") and how.endswith(" of 160 rows made dense at a time")


def test_other_places_of_the_product():
    node, x = Int(bits=4, group_size=32)(array(160, 112)), array(160, 6, seed=1)
    assert "of 160 rows" in beside(lambda w, x: w.T @ x, node, x)[0]
    assert "of 160 rows" in beside(lambda w, x: jnp.einsum("io,ib->bo", w, x), node, x)[0]
    # Along the outputs of the groups: a tied table read both ways.
    assert "of 112 rows" in beside(lambda w, x: x @ w.T, node, array(6, 112, seed=2))[0]
    low = jc.residual(Int(bits=4, group_size=32), jc.factorize.SVD(rank=4))(array(160, 112))
    hows = beside(lambda w, x: x @ w, low, array(6, 160, seed=1))
    assert hows[0].startswith("codes in groups") and len(hows) == 3


def test_stacked_layers_inside_scan():
    node = jc.stacked(Int(bits=4, group_size=32))(array(3, 128, 128) / 12)

    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert beside(fn, node, array(6, 128, seed=1))[0].startswith("codes in groups, ")


def test_a_factor_of_codes_in_groups():
    node = jc.chain(jc.factorize.SVD(rank=64), Int(bits=4, group_size=64))(array(512, 640))
    hows = beside(lambda w, x: x @ w, node, array(6, 512, seed=1))
    assert [how.split(",")[0] for how in hows] == ["codes in groups", "dense: groups along the contraction"]


@pytest.mark.parametrize("rows", [1, 6])
def test_gradients_are_those_of_the_dense_array(rows):
    node, x, y = Int(bits=4, group_size=32)(array(160, 112)), array(rows, 160, seed=1), array(rows, 112, seed=2)
    train, held = jc.split(node)

    def loss(run, train, x):
        return jnp.square(run(jc.merge(train, held), x) - y).sum()

    fast = jc.accelerate(lambda w, x: x @ w)
    found = jax.jit(jax.grad(lambda t, x: loss(fast, t, x), argnums=(0, 1)))(train, x)
    want = jax.grad(lambda t, x: loss(lambda n, x: x @ n.materialize(), t, x), argnums=(0, 1))(train, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("rows", [1, 6])
def test_no_dense_copy_is_made(rows):
    node, x = Int(bits=4, group_size=64)(array(1024, 512)), array(rows, 1024, seed=1)

    def memory(fn):
        return jax.jit(fn).lower(node, x).compile().memory_analysis().temp_size_in_bytes

    dense = memory(lambda w, x: x @ w.materialize())
    assert dense >= 4 * 1024 * 512
    assert memory(jc.accelerate(lambda w, x: x @ w)) <= dense / 2


def test_why_it_is_made_dense():
    node = Int(bits=4, group_size=32)(array(160, 112))
    assert beside(lambda w, x: x @ w, node, array(500, 160)) == ["dense: groups along the contraction, for 500 rows"]
    small = Int(bits=4, group_size=32)(array(64, 8))
    assert beside(lambda w, x: x @ w, small, array(3, 64)) == [
        "dense: groups along the contraction, for a small weight"
    ]
    kernel = Int(bits=4, group_size=16)(array(3, 3, 32, 64))

    def convolved(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (how,) = beside(convolved, kernel, array(2, 6, 6, 32))
    assert how == "dense: groups along the contraction, in a convolution"
