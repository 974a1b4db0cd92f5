"""Linear computation coding: signed powers of two, errors that fall with additions, what is stored, shifts and sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

LCC = jc.factorize.LCC


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def factors(node):
    """The matrices of each block, written out: (outputs, inputs), then (outputs, outputs) for each stage."""
    stages = [(node.inputs, node.first, node.block)]
    stages += [(w, c, node.first.shape[-2]) for w, c in zip(node.wires, node.codes, strict=True)]
    for b in range(node.first.shape[0]):
        found = []
        for wires, codes, width in stages:
            matrix = np.zeros((node.first.shape[1], width))
            for n, (places, row) in enumerate(zip(np.asarray(wires[b]), np.asarray(codes[b]), strict=True)):
                for place, code in zip(places, row, strict=True):
                    matrix[n, place] += 0 if code == 0 else np.sign(code) * 2.0 ** (2 - abs(int(code)))
            found.append(matrix)
        yield found


def test_it_is_a_product_of_factors_with_few_signed_powers_of_two():
    w = array(10, 24)
    node = LCC(stages=2, block=4)(w)
    blocks = []
    for first, *others in factors(node):
        for matrix in (first, *others):
            assert (np.count_nonzero(matrix, axis=1) <= 2).all()
        product = first
        for matrix in others:
            product = matrix @ product
        blocks.append(product.T)
    whole = np.concatenate(blocks)[:10] * np.asarray(node.scale)
    np.testing.assert_allclose(node.materialize(), whole, rtol=1e-5, atol=1e-6)


def test_more_additions_leave_less():
    w, errors, counts = array(32, 128), [], []
    for stages in (0, 1, 2, 5):
        node = LCC(stages=stages)(w)
        errors.append(float(jnp.linalg.norm(node.materialize() - w) / jnp.linalg.norm(w)))
        counts.append(jc.factorize.additions(node))
    assert errors == sorted(errors, reverse=True)
    assert [a for a, _ in counts] == sorted(a for a, _ in counts)
    assert {products for _, products in counts} == {128}
    # Every weight by itself as two signed powers of two is farther off, at nearly twice as many additions.
    rest = np.asarray(w, np.float64)
    for _ in range(2):
        rest = rest - np.sign(rest) * 2.0 ** np.floor(np.log2(np.abs(rest) * 4 / 3))
    assert errors[-1] < np.linalg.norm(rest) / np.linalg.norm(w)
    assert counts[-1][0] < 0.6 * (2 * w.size - 128)


def test_codes_and_wiring_are_stored(tmp_path):
    w = array(10, 24)
    node = LCC(stages=2, block=4, bits=5)(w)
    first, later = 3 * 24 * 2, 2 * 3 * 24 * 2
    assert node.nbits() == first * (2 + 5) + later * (5 + 5) + 24 * 32
    jc.save(tmp_path / "x.jc", {"w": node})
    np.testing.assert_array_equal(jc.load(tmp_path / "x.jc")["w"].materialize(), node.materialize())
    train, _ = jc.split(node)
    assert [x.shape for x in jax.tree.leaves(train)] == [(1, 24)]


def test_scales_are_refitted_and_layers_are_sliced():
    w = array(3, 3, 4, 8)
    node = LCC(stages=1)(w)
    assert node.shape == w.shape
    again = node.project(3 * w)
    levels = node.materialize() / node.scale[0]
    want = (levels * 3 * w).sum((0, 1, 2)) / (levels**2).sum((0, 1, 2))
    np.testing.assert_allclose(again.scale[0], want, rtol=1e-4)
    a, b = (LCC(stages=1)(array(6, 8, seed=i)) for i in (1, 2))
    stacked = jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
    np.testing.assert_allclose(stacked.materialize()[1], b.materialize(), atol=1e-6)
    _, found = jax.lax.scan(lambda carry, layer: (carry, layer.materialize()), 0, stacked)
    np.testing.assert_allclose(found[0], a.materialize(), atol=1e-6)


def test_zeros_and_what_is_refused():
    assert not LCC()(jnp.zeros((4, 6))).materialize().any()
    for bad in ({"stages": -1}, {"terms": 0}, {"bits": 9}, {"block": 0}):
        with pytest.raises(ValueError, match="stages must not be negative"):
            LCC(**bad)
    with pytest.raises(ValueError, match="LCC chooses its wiring by the values"):
        jax.jit(LCC())(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"b: LCC needs a matrix, found shape \(4,\)"):
        jc.plan({"b": jnp.ones(4)}, [("b", LCC())])
