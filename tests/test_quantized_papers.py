"""Quantizers and estimators against their papers' formulas, computed in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jcompress as jc
from jcompress.quantize import training


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Learned steps


@pytest.mark.parametrize("batch", [1, 64])
def test_a_learned_step_moves_as_far_in_a_larger_batch_of_the_same_examples(batch, rng):
    """The sum over examples of a mean loss stays, and so must the factor."""
    example, g = normal(rng, 5, 7), normal(rng, 5, 7)
    x, pulled = jnp.tile(example, (batch, 1, 1)), jnp.tile(g, (batch, 1, 1)) / batch
    _, pull = jax.vjp(lambda s: training.lsq(x, s, 3), jnp.float32(0.4))
    u = np.asarray(example) / 0.4
    slope = np.where((u > 0) & (u < 7), np.round(u) - u, np.clip(u, 0, 7))
    np.testing.assert_allclose(pull(pulled)[0], (g * slope).sum() / np.sqrt(35 * 7), rtol=1e-4)
    _, pull = jax.vjp(lambda s: training.lsq(x, s, 3, features=7), jnp.float32(0.4))
    np.testing.assert_allclose(pull(pulled)[0], (g * slope).sum() / np.sqrt(7 * 7), rtol=1e-4)
    _, pull = jax.vjp(lambda b: training.lsq_plus(x, jnp.float32(0.4), b, 3), jnp.float32(0.0))
    outside = np.where((u <= 0) | (u >= 7), g, 0).sum()
    np.testing.assert_allclose(pull(pulled)[0], outside / np.sqrt(35 * 7), rtol=1e-4)


# Binary networks


def test_xnor_weights_have_the_gradient_of_the_paper(rng):
    w, g = 1.5 * normal(rng, 6, 5), normal(rng, 6, 5)
    value, pull = jax.vjp(training.xnor, w)
    scale = np.abs(np.asarray(w)).mean(0)
    np.testing.assert_allclose(value, np.sign(w) * scale, rtol=1e-6)
    np.testing.assert_allclose(pull(g)[0], g * (1 / 6 + scale * (np.abs(np.asarray(w)) <= 1)), rtol=1e-5)
    np.testing.assert_allclose(value, jc.quantize.Int(bits=1)(w).materialize(), rtol=1e-6)
    np.testing.assert_allclose(training.xnor(w[:, 0]), np.sign(w[:, 0]) * scale[0], rtol=1e-6)


@pytest.mark.parametrize(("padding", "strides"), [("SAME", (1, 1)), ("VALID", (2, 1))])
def test_input_scales_are_the_mean_of_magnitudes_in_each_window(padding, strides, rng):
    x, window = normal(rng, 2, 7, 6, 3), (3, 3)
    found = np.asarray(training.xnor_input_scales(x, window, strides, padding))
    mean = np.abs(np.asarray(x, np.float64)).mean(-1)
    padded = np.pad(mean, ((0, 0), (1, 1), (1, 1))) if padding == "SAME" else mean
    rows, columns = (range(0, padded.shape[i + 1] - 2, strides[i]) for i in range(2))
    want = np.array([[padded[:, i : i + 3, j : j + 3].mean((1, 2)) for j in columns] for i in rows])
    np.testing.assert_allclose(found[..., 0], want.transpose(2, 0, 1), rtol=1e-5)
    # Where all magnitudes agree the scaled product of signs is the convolution itself.
    signs, kernel = jnp.sign(x), jnp.sign(normal(rng, 3, 3, 3, 4))

    def convolved(x, w):
        return jax.lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    exact = convolved(2.0 * signs, 0.5 * kernel)
    scaled = convolved(signs, kernel) * training.xnor_input_scales(2.0 * signs, window, strides, "VALID") * 0.5
    np.testing.assert_allclose(scaled, exact, rtol=1e-5)


# Grids


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_wrpn_weights_are_those_that_are_stored(bits, rng):
    w, n = normal(rng, 9, 4), 2 ** (bits - 1) - 1
    value, pull = jax.vjp(lambda w: training.wrpn(w, bits), w)
    clipped = np.clip(np.asarray(w, np.float64), -1, 1)
    np.testing.assert_allclose(value, np.round(clipped * n) / n, atol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones_like(w))[0], np.abs(np.asarray(w)) < 1)
    stored = jc.quantize.Int(bits, axis=None, clip=jc.quantize.ranges.Fixed(None, 1.0))(w)
    np.testing.assert_allclose(stored.materialize(), value, atol=1e-6)
    with pytest.raises(ValueError, match="bits=1 leaves none beside the sign"):
        training.wrpn(w, 1)


@pytest.mark.parametrize(("name", "dtype"), [("e2m3", ml_dtypes.float6_e2m3fn), ("e3m2", ml_dtypes.float6_e3m2fn)])
def test_six_bit_blocks_are_those_of_another_implementation(name, dtype, rng):
    """Ties, subnormals and what saturates among them."""
    x = rng.normal(size=480) * rng.choice([1e-3, 0.3, 3.0], 480)
    x = np.concatenate([x, np.arange(-64, 64) / 32]).astype(np.float32).reshape(-1, 32, 1)
    most = float(ml_dtypes.finfo(dtype).max)
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max(1, keepdims=True))) - np.floor(np.log2(most)))
    want = np.clip(x / scale, -most, most).astype(dtype).astype(np.float32) * scale
    node = jc.quantize.Microscaling(name)(jnp.asarray(x.reshape(-1, 1)))
    np.testing.assert_array_equal(node.materialize(), want.reshape(-1, 1))
    assert node.nbits() == 6 * x.size + 8 * x.size // 32


def test_five_bits_of_incremental_quantization_have_the_papers_eight_magnitudes(rng):
    """Zhou et al. 2017, equations 3 and 4: n1 = floor(log2(4 s / 3)), n2 = n1 + 1 - 2**(b - 1) / 2."""
    w = np.asarray(normal(rng, 400, 1)) * np.exp(2 * np.asarray(normal(rng, 400, 1)))
    top = int(np.floor(np.log2(4 * np.abs(w).max() / 3)))
    powers = 2.0 ** np.arange(top + 1 - 2**4 // 2, top + 1)
    node = jc.quantize.PowersOfTwo(bits=5, magnitudes=8)(jnp.asarray(w))
    found = np.abs(np.asarray(node.materialize()))
    assert set(np.unique(found)) == {0.0, *powers}
    levels = np.array([0.0, *powers])
    np.testing.assert_array_equal(found, levels[np.abs(np.abs(w)[..., None] - levels).argmin(-1)])
    with pytest.raises(ValueError, match="magnitudes=16 is not an integer from 1 to 15"):
        jc.quantize.PowersOfTwo(bits=5, magnitudes=16)
