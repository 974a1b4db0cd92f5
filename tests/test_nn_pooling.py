"""Pooling with positions drawn at random, and pooling that preserves details."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jcompress as jc

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def windows(x, size):
    """The values of each window, (..., h / size, w / size, size * size, c)."""
    *front, h, w, c = x.shape
    x = np.asarray(x).reshape(*front, h // size, size, w // size, size, c)
    return np.moveaxis(x, -4, -3).reshape(*front, h // size, w // size, size * size, c)


def test_rows_and_columns_are_drawn_from_each_strip_in_order():
    place = jnp.arange(144.0).reshape(1, 12, 12, 1)  # rises, so a window's maximum is its last position
    y = np.asarray(jc.nn.s3pool(place, 3, 6, KEY))[0, :, :, 0]
    rows, columns = y // 12, y % 12
    assert np.all(rows == rows[:, :1]) and np.all(columns == columns[:1])  # whole rows and columns
    for line in (rows[:, 0], columns[0]):
        start = np.maximum(line - 2, 0)  # where the window of three began, but at the rim
        assert np.all(np.diff(line) >= 0) and np.all(start[:2] < 6) and np.all(start[2:] >= 4)


def test_on_the_mean_it_is_average_pooling_of_maxima():
    x = normal(0, 2, 4, 6, 3)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf)
    top = np.max([padded[:, i : i + 4, j : j + 6] for i, j in itertools.product(range(2), repeat=2)], axis=0)
    np.testing.assert_allclose(jc.nn.s3pool(x), windows(top, 2).mean(-2), rtol=1e-6)
    drawn = jax.vmap(lambda key: jc.nn.s3pool(x, key=key))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(drawn.mean(0), jc.nn.s3pool(x), atol=0.06)
    assert drawn.std(0).max() > 0.1


def test_details_count_by_their_formula():
    x = normal(1, 2, 4, 4, 3)
    for symmetric in (False, True):
        alpha, power = jnp.array([0.1, 1.0, 3.0]), jnp.array([0.5, 1.0, 2.0])
        found = jc.nn.detail_preserving_pool(x, alpha, power, symmetric=symmetric)
        each = windows(x, 2)
        apart = each - each.mean(-2, keepdims=True)
        out = np.sqrt((apart if symmetric else np.maximum(apart, 0)) ** 2 + 1e-6)
        weight = np.asarray(alpha) + out ** np.asarray(power)
        np.testing.assert_allclose(found, (weight * each).sum(-2) / weight.sum(-2), rtol=1e-5, atol=1e-6)


def test_between_the_mean_and_the_maximum():
    x = normal(2, 1, 4, 4, 2)
    mean, top = windows(x, 2).mean(-2), windows(x, 2).max(-2)
    np.testing.assert_allclose(jc.nn.detail_preserving_pool(x, 1.0, 0.0), mean, atol=1e-6)
    np.testing.assert_allclose(jc.nn.detail_preserving_pool(x, 1e6, 1.0), mean, atol=1e-4)
    np.testing.assert_allclose(jc.nn.detail_preserving_pool(10 * x, 1e-6, 20.0) / 10, top, atol=0.05)
    flat = jnp.full((1, 2, 2, 1), 3.0)
    slopes = jax.grad(lambda x, a, p: jc.nn.detail_preserving_pool(x, a, p).sum(), argnums=(0, 1, 2))(flat, 1.0, 1.0)
    assert all(bool(jnp.isfinite(s).all()) for s in slopes)


def test_the_module_learns_to_take_the_maximum():
    module, x = jc.nn.DetailPreservingPool(1, rngs=nnx.Rngs(0)), normal(3, 16, 4, 4, 1)
    top = jnp.asarray(windows(x, 2).max(-2))

    @nnx.jit
    def step(module):
        value, slopes = nnx.value_and_grad(lambda m: jnp.mean((m(x) - top) ** 2))(module)
        nnx.update(module, jax.tree.map(lambda p, g: p - 0.5 * g, nnx.state(module, nnx.Param), slopes))
        return value

    first, *_, last = [float(step(module)) for _ in range(100)]
    assert last < 0.3 * first


def test_what_does_not_fit_is_told():
    x = jnp.ones((1, 4, 6, 1))
    with pytest.raises(ValueError, match=r"x \(1, 4, 6, 1\), window 2 and grid 4; expected a grid that divides"):
        jc.nn.s3pool(x, 2, 4)
    with pytest.raises(ValueError, match="window 3, expected one that divides height and width"):
        jc.nn.detail_preserving_pool(x, window=3)
