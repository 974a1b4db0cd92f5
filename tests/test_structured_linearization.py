"""Path lengths by counting paths, and merged layers against the layers one after the other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.prune import structured


def test_the_penalty_has_its_gradient_and_none_where_a_channel_is_linear():
    slopes = {"one": jnp.array([0.0, 0.75, 1.0]), "two": jnp.array([2.0])}
    assert float(structured.linearity_penalty(slopes)) == pytest.approx(1 + 0.5 + 0 + 1)
    grads = jax.grad(structured.linearity_penalty)(slopes)
    np.testing.assert_allclose(grads["one"], [-0.5, -1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(grads["two"], [0.5], rtol=1e-6)
    assert float(structured.linearity_penalty(slopes, power=1.0)) == pytest.approx(2.25)


def test_the_prior_makes_the_channels_linear_that_may_be(rng):
    # The target is linear in the first two channels and a ReLU in the last two.
    x = jnp.asarray(rng.normal(size=(256, 4)), jnp.float32)
    target = structured.prelu(x, jnp.array([1.0, 1.0, 0.0, 0.0]))

    def loss(slope):
        return jnp.mean(jnp.square(structured.prelu(x, slope) - target)) + 0.01 * structured.linearity_penalty(slope)

    tx, slope, gradient = optax.adam(0.02), jnp.full(4, 0.25), jax.jit(jax.grad(loss))
    state = tx.init(slope)
    for _ in range(200):
        updates, state = tx.update(gradient(slope), state)
        slope = optax.apply_updates(slope, updates)
    np.testing.assert_allclose(slope, [1, 1, 0, 0], atol=0.1)
    assert float(jc.measure.average_path_length(slope, tolerance=0.1)) == 0.5


@pytest.mark.parametrize("depth", [1, 4])
def test_stacks_count_their_nonlinear_channels(rng, depth):
    slopes = [jnp.asarray(rng.integers(0, 2, size=8), jnp.float32) for _ in range(depth)]
    expected = sum(float((s != 1).mean()) for s in slopes)
    assert float(jc.measure.average_path_length(slopes)) == pytest.approx(expected)
    assert float(jc.measure.average_path_length([0.0] * depth)) == depth
    assert float(jc.measure.average_path_length([1.0] * depth)) == 0
    assert float(jax.jit(jc.measure.average_path_length)(slopes)) == pytest.approx(expected)


def test_a_residual_join_gives_each_branch_one_half():
    # Four layers of width 4 beside a skip: 256 paths and 1, of which the skip counts as much as all others together.
    assert float(jc.measure.average_path_length([([0.0] * 4, [])])) == 2
    unnormalized = np.mean([4] * 4**4 + [0])
    assert float(jc.measure.average_path_length([([0.0] * 4, [])])) < unnormalized


def test_joins_in_series_average_over_all_ways(rng):
    slopes = [jnp.asarray(rng.integers(0, 2, size=10), jnp.float32) for _ in range(7)]
    p = [float((s != 1).mean()) for s in slopes]
    blocks = [(slopes[0:2], []), (slopes[2:3], slopes[3:6], []), ([slopes[6], (0.0, [])], [])]
    ways = itertools.product([p[0] + p[1], 0], [p[2], sum(p[3:6]), 0], [p[6] + 1, p[6], 0, 0])
    expected = np.mean([sum(way) for way in ways])
    assert float(jc.measure.average_path_length(blocks)) == pytest.approx(expected, rel=1e-5)


def drawn(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_merged_dense_layers_are_the_two_in_turn(rng, biases):
    w1, w2, x = drawn(rng, 5, 7), drawn(rng, 7, 3), drawn(rng, 4, 5)
    b1, b2 = (drawn(rng, n) if there else None for n, there in zip((7, 3), biases, strict=True))
    w, b = jc.rewrite.merge_dense((w1, b1), (w2, b2))
    expected = (x @ w1 + (0 if b1 is None else b1)) @ w2 + (0 if b2 is None else b2)
    np.testing.assert_allclose(x @ w + (0 if b is None else b), expected, rtol=1e-4, atol=1e-4)
    assert (b is None) == (not any(biases))


def convolve(x, kernel, bias, strides=1, padding="VALID"):
    n = kernel.ndim - 2
    places = "DHW"[-n:]
    strides = (strides,) * n if isinstance(strides, int) else strides
    numbers = (f"N{places}C", f"{places}IO", f"N{places}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers) + bias


CASES = {
    "3x3 then 1x1, same": ((3, 3), (1, 1), (1, 1), (1, 1), "SAME", "VALID"),
    "3x3 strided then 1x1": ((3, 3), (1, 1), (2, 2), (1, 1), "SAME", "VALID"),
    "1x1 then 3x3": ((1, 1), (3, 3), (1, 1), (1, 1), "VALID", "VALID"),
    "3x3 then 3x3": ((3, 3), (3, 3), (1, 1), (1, 1), "VALID", "VALID"),
    "2x3 then 3x2": ((2, 3), (3, 2), (1, 1), (1, 1), "VALID", "VALID"),
    "strides of both": ((3, 2), (2, 3), (2, 1), (1, 2), "VALID", "VALID"),
    "one axis": ((4,), (3,), (2,), (2,), "VALID", "VALID"),
    "three axes": ((2, 2, 2), (2, 1, 2), (1, 2, 1), (1, 1, 1), "VALID", "VALID"),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_convolutions_are_the_two_in_turn(rng, case):
    one, two, first, second, pad1, pad2 = CASES[case]
    k1, k2, b1, b2 = drawn(rng, *one, 3, 5), drawn(rng, *two, 5, 4), drawn(rng, 5), drawn(rng, 4)
    x = drawn(rng, 2, *[11 - len(one)] * len(one), 3)
    expected = convolve(convolve(x, k1, b1, first, pad1), k2, b2, second, pad2)
    kernel, bias = jc.rewrite.merge_convolutions((k1, b1), (k2, b2), first)
    strides = tuple(a * b for a, b in zip(first, second, strict=True))
    found = convolve(x, kernel, bias, strides, pad1)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_pointwise_layer_without_bias_merges_under_padding(rng):
    k1, k2, x = drawn(rng, 1, 1, 3, 5), drawn(rng, 3, 3, 5, 4), drawn(rng, 2, 6, 6, 3)
    kernel, bias = jc.rewrite.merge_convolutions((k1, None), (k2, None))
    assert bias is None
    expected = convolve(convolve(x, k1, 0), k2, 0, padding="SAME")
    np.testing.assert_allclose(convolve(x, kernel, 0, padding="SAME"), expected, atol=1e-4)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"merge_dense: found kernels of shapes \(2, 3\) and \(4, 5\)"):
        jc.rewrite.merge_dense((jnp.ones((2, 3)), None), (jnp.ones((4, 5)), None))
    with pytest.raises(ValueError, match=r"strides \(1,\), expected as many window axes"):
        jc.rewrite.merge_convolutions((jnp.ones((3, 3, 1, 1)), None), (jnp.ones((3, 3, 1, 1)), None), (1,))
    with pytest.raises(ValueError, match="tuple of no branches"):
        jc.measure.average_path_length(())
    with pytest.raises(ValueError, match="without slopes"):
        jc.measure.average_path_length(jnp.ones(0))
