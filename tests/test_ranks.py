"""Ranks that depend on the values: planted ones are found, bounds are kept, the errors."""

import itertools

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


def tails(w, part):
    """What is left by each rank of an unfolding: squared, from rank 1."""
    rest = [i for i in range(w.ndim) if i not in part]
    matrix = w.transpose(*part, *rest).reshape(int(np.prod([w.shape[i] for i in part])), -1)
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return np.array([squares[r:].sum() for r in range(1, len(squares) + 1)])


def orders(w):
    """For each order of the modes, its sizes and what the unfoldings along it leave."""
    known = {part: tails(w, part) for n in range(1, w.ndim) for part in itertools.combinations(range(w.ndim), n)}
    for order in itertools.permutations(range(w.ndim)):
        yield [w.shape[i] for i in order], [known[tuple(sorted(order[:n]))] for n in range(1, w.ndim)]


def count(sizes, ranks):
    edges = [1, *ranks, 1]
    return sum(a * n * b for a, n, b in zip(edges, sizes, edges[1:], strict=False))


def train_of(order, ranks, sizes, decibel=np.inf, seed=0):
    """A train along an order of the modes, in white noise."""
    rng = np.random.default_rng(seed)
    edges = [1, *ranks, 1]
    w = np.ones((1, 1))
    for mode, a, b in zip(order, edges, edges[1:], strict=False):
        w = np.tensordot(w, rng.normal(size=(a, sizes[mode], b)), 1)
    w = w.reshape([sizes[i] for i in order]).transpose(np.argsort(order))
    return w + rng.normal(size=w.shape) * np.sqrt(np.mean(w**2) * 10 ** (-decibel / 10))


@pytest.mark.parametrize("seed", range(2))
def test_the_best_order_is_that_of_brute_force(seed):
    w = train_of((2, 0, 3, 1), (2, 4, 2), (3, 4, 5, 6), 10, seed)
    norm, x = (w**2).sum(), jnp.asarray(w, jnp.float32)
    limit = 0.3**2 * norm / 3
    fewest = min(count(sizes, [int((t > limit).sum()) + 1 for t in left]) for sizes, left in orders(w))
    node = F.TensorTrain(tolerance=0.3, order="best")(x)
    assert node.nbits() // 32 <= fewest
    assert float(jnp.linalg.norm((node.materialize() - x).ravel())) <= 0.3 * np.sqrt(norm) * 1.0001

    allowed = 0.4 * w.size
    limits = [t for _, left in orders(w) for tail in left for t in tail]
    least = min(
        most
        for sizes, left in orders(w)
        for most in limits
        if count(sizes, [int((t > most * (1 + 1e-9)).sum()) + 1 for t in left]) <= allowed
    )
    node = F.TensorTrain(rank=0.4, order="best")(x)
    assert node.nbits() // 32 <= allowed
    assert float(jnp.sum((node.materialize() - x) ** 2)) <= 3 * least * 1.0001

    bounds = {tuple(sizes): sum(t[min(2, len(t)) - 1] for t in left) for sizes, left in orders(w)}
    terms = F.TensorTrain(rank=2, order="best")(x).factors
    found = tuple(y.shape[1 if i else 0] for i, y in enumerate(terms))
    np.testing.assert_allclose(bounds[found], min(bounds.values()), rtol=1e-6)


@pytest.mark.parametrize("options", [{"rank": "evbmf"}, {"tolerance": 0.17}])
def test_a_planted_order_is_found_with_its_ranks(options):
    order, sizes = (2, 0, 3, 1), (8, 9, 10, 11)
    w = jnp.asarray(train_of(order, (3, 4, 2), sizes, 20), jnp.float32)
    node = F.TensorTrain(order="best", **options)(w)
    shapes = [x.shape for x in node.factors]
    assert shapes in ([(10, 3), (3, 8, 4), (4, 11, 2), (2, 9)], [(9, 2), (2, 11, 4), (4, 8, 3), (3, 10)])
    as_it_is = F.TensorTrain(**options)(w)
    assert as_it_is.nbits() > 2 * node.nbits() and node.shape == w.shape


def test_modes_of_axes_are_ordered_too():
    """A dense layer whose modes are a train in an order that pairs nothing."""
    w = train_of((3, 0, 2, 1), (2, 3, 2), (4, 6, 5, 4), 30).reshape(24, 20)
    shape = ((4, 6), (5, 4))
    node = F.TensorTrain(rank="evbmf", shape=shape, order="best")(jnp.asarray(w, jnp.float32))
    assert [x.shape for x in node.factors] in (
        [(4, 2), (2, 4, 3), (3, 5, 2), (2, 6)],
        [(6, 2), (2, 5, 3), (3, 4, 2), (2, 4)],
    )
    given = F.TensorTrain(tolerance=0.1, shape=shape, order=(3, 0, 2, 1))(jnp.asarray(w, jnp.float32))
    for found in (node, given):
        assert found.shape == (24, 20) and np.linalg.norm(found.materialize() - w) < 0.1 * np.linalg.norm(w)
    layers = {"w": jnp.asarray(np.stack([w, w[::-1]]), jnp.float32)}
    method = F.TensorTrain(rank=0.3, shape=shape, order="best")
    plan = jc.plan(layers, [("w", method)], layout={"w": jc.Layout(batch=0, inputs=1, outputs=2)})
    assert jc.compress(layers, plan)["w"].shape == (2, 24, 20)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: F.SVD(rank=2, tolerance=0.1), "SVD needs a rank, an energy or a tolerance, one of them"),
        (lambda: F.Tucker(), "Tucker needs a rank"),
        (lambda: F.TensorTrain(tolerance=1.0), r"TensorTrain: tolerance=1.0 is outside \(0, 1\)"),
        (lambda: F.Tucker(energy=0), r"Tucker: energy=0 is outside \(0, 1\]"),
        (lambda: F.TensorTrain(rank=2, order="any"), "TensorTrain: order='any' is unknown; use 'best'"),
        (lambda: F.TensorRing(rank=2, order="best"), "TensorRing: found order='best'"),
        (lambda: F.TensorTrain(rank=2, order="best")(jnp.ones((1,) * 11)), "11 modes .* too many for order=best"),
        (lambda: jax.jit(F.TensorTrain(rank=2, order="best"))(jnp.ones((4, 4))), "TensorTrain chooses its rank"),
        (lambda: F.SVD(rank="vbmf"), "SVD: rank='vbmf' is unknown; use 'evbmf'"),
        (lambda: F.BlockTerm(ranks="evbmf"), "BlockTerm: ranks='evbmf' depends on the values"),
        (lambda: F.SVD(rank="evbmf", randomized=True), "SVD: randomized=True needs a rank"),
        (lambda: jax.jit(F.Tucker("evbmf"))(jnp.ones((4, 4))), "Tucker chooses its rank by the values"),
    ],
)
def test_what_is_no_choice(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
