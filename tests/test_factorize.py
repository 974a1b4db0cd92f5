"""Singular value decomposition: the best approximation, and the rank it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

SVD = jc.factorize.SVD


def matrix(shape=(20, 12), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_error_is_that_of_eckart_and_young(rank):
    w = matrix()
    tail = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[rank:]
    error = float(((SVD(rank=rank)(w).materialize() - w) ** 2).sum())
    np.testing.assert_allclose(error, (tail**2).sum(), rtol=1e-4)


def test_full_rank_is_exact():
    w = matrix()
    np.testing.assert_allclose(SVD(rank=12)(w).materialize(), w, atol=1e-5)


def test_a_convolution_counts_as_one_matrix():
    w = matrix((3, 3, 4, 8))
    node = SVD(rank=5)(w)
    flat = SVD(rank=5)(w.reshape(36, 8))
    assert node.u.shape == (3, 3, 4, 5)
    np.testing.assert_allclose(node.materialize().reshape(36, 8), flat.materialize(), atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy):
    w = matrix()
    parts = np.cumsum(np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2)
    want = int(np.searchsorted(parts / parts[-1], energy - 1e-9)) + 1
    assert SVD(energy=energy)(w).v.shape[0] == min(want, 12)


def test_energy_under_jit_says_why_not():
    with pytest.raises(ValueError, match=r"works outside jit only; give a rank"):
        jax.jit(SVD(energy=0.9))(matrix())


def test_the_randomized_form_recovers_a_planted_rank():
    w = matrix((60, 5)) @ matrix((5, 40), seed=1)
    params = {"w": w}
    node = jc.compress(params, jc.plan(params, [("w", SVD(rank=5, randomized=True))]), key=jax.random.key(0))["w"]
    np.testing.assert_allclose(node.materialize(), w, atol=1e-3)
    with pytest.raises(ValueError, match="w: SVD needs 'key'"):
        jc.compress(params, jc.plan(params, [("w", SVD(rank=5, randomized=True))]))


def test_the_randomized_form_is_near_the_optimum():
    w = matrix((60, 40))
    best = float(((SVD(rank=8)(w).materialize() - w) ** 2).sum())
    node = SVD(rank=8, randomized=True)(w, jc.Context(key=jax.random.key(0)))
    assert float(((node.materialize() - w) ** 2).sum()) < 1.01 * best


def test_layers_stacked_for_scan_get_factors_of_their_own():
    w = matrix((3, 10, 6))
    node = jc.stacked(SVD(rank=2))(w)
    assert node.u.shape == (3, 10, 2)
    for i in range(3):
        np.testing.assert_allclose(node.materialize()[i], SVD(rank=2)(w[i]).materialize(), atol=1e-5)


def test_bad_ranks_name_the_parameter_and_the_limit():
    params = {"head": {"kernel": jnp.ones((20, 12))}}
    with pytest.raises(
        ValueError, match=r"head/kernel: rank 13 is above the limit 12 of a 20 x 12 matrix; .* 7.5 to win bytes"
    ):
        jc.plan(params, [(".*", SVD(rank=13))])
    with pytest.raises(ValueError, match=r"bias: SVD needs a matrix, found shape \(4,\)"):
        jc.plan({"bias": jnp.ones(4)}, [("bias", SVD(rank=1))])
    for kwargs in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(ValueError, match="SVD"):
            SVD(**kwargs)


def test_dense_factors_as_the_oracle_of_tensorly():
    """The same truncation by an independent library, on host arrays."""
    partial_svd = pytest.importorskip("tensorly").tenalg.svd_interface
    w = np.asarray(matrix(), np.float64)
    u, s, v = partial_svd(w, n_eigenvecs=4)
    np.testing.assert_allclose(SVD(rank=4)(matrix()).materialize(), (u * s) @ v, atol=1e-5)


# Principal components of the inputs


def outputs_moved(node, w, gram):
    change = np.asarray(node.materialize() - w, np.float64).reshape(-1, w.shape[-1])
    return np.einsum("ki,kl,li->", change, np.asarray(gram, np.float64), change)


def met(k, seed=3):
    x = np.random.default_rng(seed).normal(size=(200, k)) * np.logspace(-1, 1, k)
    return jc.trace.Stats(gram=jnp.asarray(x.T @ x, jnp.float32), axes=(0,))


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_errors_of_components_add_up_and_the_least_are_cut(rank):
    w, stats = matrix((12, 7)), met(12)
    node = jc.factorize.PrincipalComponents(rank=min(rank, 7))(w, jc.Context(stats=stats))
    values, vectors = np.linalg.eigh(np.asarray(stats.gram, np.float64))
    worth = np.sort(values * ((vectors.T @ np.asarray(w, np.float64)) ** 2).sum(1))
    np.testing.assert_allclose(outputs_moved(node, w, stats.gram), worth[: 12 - min(rank, 7)].sum(), rtol=1e-3)
    np.testing.assert_allclose(node.u.T @ node.u, np.eye(node.u.shape[1]), atol=1e-5)
    whitened = jc.factorize.WhitenedSVD(rank=min(rank, 7), damping=1e-6)(w, jc.Context(stats=stats))
    assert outputs_moved(whitened, w, stats.gram) <= 1.001 * outputs_moved(node, w, stats.gram)


def test_inputs_of_few_dimensions_need_no_more_components():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(100, 3)) @ rng.normal(size=(3, 12))
    stats = jc.trace.Stats(gram=jnp.asarray(x.T @ x, jnp.float32), axes=(0,))
    node = jc.factorize.PrincipalComponents(rank=3)(matrix((12, 7)), jc.Context(stats=stats))
    np.testing.assert_allclose(x @ node.materialize(), x @ matrix((12, 7)), atol=1e-3)
