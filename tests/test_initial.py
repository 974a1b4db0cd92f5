"""Factors to train from scratch begin as large as the dense layer would, and train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

F = jc.factorize


@pytest.mark.parametrize(
    ("rank", "shape"),
    [(8, (64, 48)), (0.3, (64, 48)), (F.Tucker(ranks=0.3), (3, 3, 16, 24)), (F.CP(rank=12, sweeps=5), (3, 3, 16, 24))],
    ids=repr,
)
def test_the_product_has_the_variance_of_the_dense_layer(rank, shape):
    node = F.spectral_init(jax.random.key(1), shape, rank)
    drawn, _ = jax.random.split(jax.random.key(1))
    dense = jax.nn.initializers.lecun_normal()(drawn, shape)
    np.testing.assert_allclose(np.square(node.materialize()).sum(), np.square(dense).sum(), rtol=1e-4)
    fan_in = int(np.prod(shape[:-1]))
    assert 0.8 < float(node.materialize().std()) * fan_in**0.5 < 1.25
    assert node.shape == shape and node.nbits() < 32 * dense.size


def test_low_rank_has_the_directions_of_the_dense_layer():
    drawn, _ = jax.random.split(jax.random.key(0))
    dense = jax.nn.initializers.normal(0.1)(drawn, (40, 30))
    node = F.spectral_init(jax.random.key(0), (40, 30), 5, jax.nn.initializers.normal(0.1))
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ v[:5]
    np.testing.assert_allclose(node.materialize(), best * np.linalg.norm(dense) / np.linalg.norm(best), atol=1e-5)
    np.testing.assert_allclose(node.u.T @ node.u, node.v @ node.v.T, atol=1e-4)


def test_it_trains_in_factors():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 20)), jnp.float32)
    y = x @ jnp.asarray(rng.normal(size=(20, 3)) @ rng.normal(size=(3, 10)), jnp.float32)
    node = F.spectral_init(jax.random.key(0), (20, 10), 3, dtype=jnp.float32)

    def loss(node):
        return jnp.square(x @ node.materialize() - y).mean()

    step = jax.jit(lambda n: jax.tree.map(lambda p, g: p - 0.05 * g, n, jax.grad(loss)(n)))
    before = loss(node)
    for _ in range(300):
        node = step(node)
    assert loss(node) < 1e-3 * before


def test_what_gives_no_factors():
    with pytest.raises(ValueError, match=r"spectral_init: .* expected LowRank or TensorNetwork"):
        F.spectral_init(jax.random.key(0), (8, 8), jc.quantize.Int(bits=8))
    with pytest.raises(ValueError, match="spectral_init: rank 9 is above the limit 8"):
        F.spectral_init(jax.random.key(0), (8, 8), 9)
