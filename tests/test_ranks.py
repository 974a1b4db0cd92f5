"""Ranks that depend on the values: planted ones are found, bounds are kept, the errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

F = jc.factorize


def planted(shape, rank, decibel, seed=0):
    """A product of Gaussian factors in white noise so many decibels below it."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    noise = rng.normal(size=shape) * np.sqrt(np.mean(w**2) * 10 ** (-decibel / 10))
    return w + noise


@pytest.mark.parametrize("decibel", [10, 20, 40, np.inf])
@pytest.mark.parametrize(("shape", "rank"), [((80, 60), 5), ((64, 300), 10), ((40, 40), 3), ((300, 30), 1)])
def test_planted_ranks_are_found(shape, rank, decibel):
    values = np.linalg.svd(planted(shape, rank, decibel).astype(np.float32), compute_uv=False)
    assert F.evbmf(values, shape) == rank
    assert F.evbmf(1e-12 * values, shape) == rank


def test_in_noise_alone_nothing_is_found():
    values = np.linalg.svd(np.random.default_rng(0).normal(size=(60, 90)), compute_uv=False)
    assert F.evbmf(values, (60, 90)) == F.evbmf(np.zeros(3), (3, 4)) == 1


def test_it_is_the_least_free_energy():
    """By brute force over every variance of a fine grid and every rank, with the two terms written out apart."""
    values = np.linalg.svd(planted((30, 50), 4, 6, seed=3), compute_uv=False)
    ratio = 30 / 50
    tau = 2.5129 * np.sqrt(ratio)
    limit = (1 + tau) * (1 + ratio / tau)
    best = None
    for variance in np.geomspace(values[-1] ** 2 / 500, values[0] ** 2, 4000):
        x = values**2 / (50 * variance)
        shift = np.where(x > limit, x - 1 - ratio, 3)
        t = 0.5 * (shift + np.sqrt(shift**2 - 4 * ratio))
        gain = np.where(x > limit, np.log(t + 1) + ratio * np.log(t / ratio + 1) - t, 0)
        free = np.sum(x - np.log(x) + gain)
        if best is None or free < best[0]:
            best = free, int((x > limit).sum())
    assert F.evbmf(values, (30, 50)) == best[1]


def test_methods_take_it():
    w = jnp.asarray(planted((72, 40), 4, 20), jnp.float32)
    assert F.SVD(rank="evbmf")(w).v.shape == (4, 40)
    assert F.SVD(rank="evbmf")(w.reshape(3, 3, 8, 40)).v.shape == (4, 40)
    assert [x.shape for x in F.TensorTrain(rank="evbmf")(w).factors] == [(72, 4), (4, 40)]
    rng = np.random.default_rng(0)
    small = rng.normal(size=(3, 3, 4, 5))
    kernel = np.einsum("hwrs,ir,os->hwio", small, rng.normal(size=(24, 4)), rng.normal(size=(30, 5)))
    kernel = jnp.asarray(kernel + 0.1 * kernel.std() * rng.normal(size=kernel.shape), jnp.float32)
    assert [x.shape for x in F.Tucker("evbmf")(kernel).factors] == [(3, 3, 4, 5), (24, 4), (30, 5)]
    layers = {"w": jnp.stack([w, jnp.asarray(planted((72, 40), 2, 20, seed=1), jnp.float32)])}
    for method in (F.SVD(rank="evbmf"), F.Tucker("evbmf")):
        plan = jc.plan(layers, [("w", method)], layout={"w": jc.Layout(batch=0, inputs=1, outputs=2)})
        shapes = [x.shape for x in jax.tree.leaves(jc.compress(layers, plan))]
        assert (2, 72, 4) in shapes


@pytest.mark.parametrize("method", [F.SVD, F.Tucker, F.TensorTrain])
def test_bounds_are_kept_by_small_ranks(method):
    rng = np.random.default_rng(1)
    w = np.linalg.qr(rng.normal(size=(24, 20)))[0] * 0.7 ** np.arange(20) @ np.linalg.qr(rng.normal(size=(20, 20)))[0]
    w = jnp.asarray(w.reshape(24, 4, 5) if method is F.TensorTrain else w, jnp.float32)
    sizes = []
    for tolerance in (0.3, 0.1, 0.03):
        node = method(tolerance=tolerance)(w)
        left = float(jnp.linalg.norm((node.materialize() - w).ravel()) / jnp.linalg.norm(w.ravel()))
        assert left <= tolerance * 1.0001
        by_energy = method(energy=1 - tolerance**2)(w)
        assert jax.tree.map(jnp.shape, by_energy) == jax.tree.map(jnp.shape, node)
        sizes.append(node.nbits())
    assert sizes == sorted(set(sizes)) and sizes[0] < 0.6 * 32 * w.size


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: F.SVD(rank=2, tolerance=0.1), "SVD needs a rank, an energy or a tolerance, one of them"),
        (lambda: F.Tucker(), "Tucker needs a rank"),
        (lambda: F.TensorTrain(tolerance=1.0), r"TensorTrain: tolerance=1.0 is outside \(0, 1\)"),
        (lambda: F.Tucker(energy=0), r"Tucker: energy=0 is outside \(0, 1\]"),
        (lambda: F.SVD(rank="vbmf"), "SVD: rank='vbmf' is unknown; use 'evbmf'"),
        (lambda: F.BlockTerm(ranks="evbmf"), "BlockTerm: ranks='evbmf' depends on the values"),
        (lambda: F.SVD(rank="evbmf", randomized=True), "SVD: randomized=True needs a rank"),
        (lambda: jax.jit(F.Tucker("evbmf"))(jnp.ones((4, 4))), "Tucker chooses its rank by the values"),
    ],
)
def test_what_is_no_choice(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
