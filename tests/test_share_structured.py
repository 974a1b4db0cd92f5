"""Hashed and structured matrices, each against its definition written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
import scipy.linalg

import jcompress as jc
from jcompress import core
from jcompress.formats import FastProduct, Gathered

S = jc.share
M32 = 0xFFFFFFFF


def matrix(shape=(24, 16), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def error(node, w):
    return float(jnp.linalg.norm(node.materialize() - w) / jnp.linalg.norm(w))


def mixed(h):
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & M32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & M32
    return h ^ (h >> 16)


def hash_of(seed, *index):
    h = mixed(seed)
    for i in index:
        h = mixed(h ^ i)
    return h


def sign(h):
    return 1 - 2 * (mixed(h ^ 0x5BF03635) >> 31)


def test_the_hash_is_a_function_of_seed_and_index():
    values, seed = np.random.default_rng(0).normal(size=10).astype("f4"), 2**32 - 5
    found = Gathered(jnp.asarray(values), (5, 7), "hash", (10,), seed).materialize()
    for i, j in itertools.product(range(5), range(7)):
        h = hash_of(seed, i, j)
        assert found[i, j] == sign(h) * values[h % 10]


def test_the_hash_gives_these_numbers_on_every_platform():
    node = Gathered(jnp.arange(1.0, 8.0), (2, 4), "hash", (7,), 0)
    wanted = [[sign(h) * (h % 7 + 1) for h in (hash_of(0, i, j) for j in range(4))] for i in range(2)]
    assert wanted == node.materialize().tolist() == jax.jit(lambda n: n.materialize())(node).tolist()


def test_buckets_are_filled_alike_and_signs_are_even():
    places, minus = Gathered(None, (256, 256), "hash", (64,), 3)._places()
    load = np.bincount(np.ravel(places), minlength=64)
    assert abs(load - 1024).max() < 5 * 32  # five standard deviations
    assert abs(np.mean(minus) - 0.5) < 0.01
    corner = np.abs(np.fft.fft2(np.where(minus, -1.0, 1.0)))
    assert corner.max() < 5 * 256  # no period


@pytest.mark.parametrize("method", [S.Hashed(0.2, seed=4), S.Circulant(block=8, seed=1)], ids=repr)
def test_the_gradient_of_a_value_is_the_sum_over_its_entries(method):
    w, upstream = matrix(), matrix(seed=1)
    node = method(w)
    gradient = jax.grad(lambda v: (Gathered(v, *_static(node)).materialize() * upstream).sum())(node.values)
    places, minus = map(np.asarray, node._places())
    signed = np.where(minus, -1, 1) * np.asarray(upstream)
    np.testing.assert_allclose(gradient, np.bincount(places.ravel(), signed.ravel(), node.count), atol=1e-4)


def _static(node):
    return node.sizes, node.rule, node.slots, node.seed


PLANTED = [
    S.Hashed(0.3, seed=2), S.HashedFrequencies(0.3), S.Circulant(), S.Circulant(4), S.Circulant(10, seed=3),
    S.Toeplitz(1), S.Toeplitz(3),
]  # fmt: skip


@pytest.mark.parametrize("method", PLANTED, ids=repr)
def test_a_planted_array_is_recovered(method):
    w = matrix((3, 3, 16, 8) if isinstance(method, S.HashedFrequencies) else (20, 20))
    planted = method(w)
    x = planted.materialize()
    assert error(method(x), x) < 2e-6


@pytest.mark.parametrize("method", [S.Hashed(0.25), S.Circulant(), S.HashedFrequencies(0.25)], ids=repr)
def test_closed_forms_are_orthogonal_projections(method):
    w = matrix((3, 3, 16, 8))
    x, other = method(w).materialize(), method(matrix(w.shape, seed=1)).materialize()
    assert abs(float(((w - x) * other).sum())) < 1e-3 * float(jnp.linalg.norm(w) * jnp.linalg.norm(other))


def test_a_circulant_is_the_one_of_scipy_and_means_of_cyclic_diagonals():
    v = np.random.default_rng(0).normal(size=6).astype("f4")
    node = Gathered(jnp.asarray(v), (6, 6), "circulant", (6,))
    np.testing.assert_array_equal(node.materialize(), scipy.linalg.circulant(v).T)
    w = np.asarray(matrix((6, 6)))
    means = [np.mean([w[i, (i + d) % 6] for i in range(6)]) for d in range(6)]
    np.testing.assert_allclose(S.Circulant()(jnp.asarray(w)).values, means, atol=1e-6)


def test_frequencies_are_those_of_scipy():
    node = S.HashedFrequencies(ratio=0.5)(matrix((3, 4, 8, 4)))
    places, minus = map(np.asarray, node._places())
    coefficients = np.where(minus, -1, 1) * np.asarray(node.values)[places]
    wanted = scipy.fft.idctn(coefficients, axes=(0, 1), norm="ortho")
    np.testing.assert_allclose(node.materialize(), wanted, atol=1e-6)
    band = np.add.outer(np.arange(3), np.arange(4))
    ends = np.cumsum(node.slots)
    for j, end in enumerate(ends):
        inside = places[band == j]
        assert (ends[j] - node.slots[j] <= inside).all() and (inside < end).all()
    smooth = jnp.ones((3, 4, 8, 4)) * matrix((8, 4), seed=2)
    assert error(S.HashedFrequencies(0.25, decay=2.0)(smooth), smooth) < 0.8 * error(S.Hashed(0.25)(smooth), smooth)


def dense_steps(node):
    """The product of NumPy's matrices, term by term."""
    n, terms = node.vectors[0].shape
    total = np.zeros((n, n))
    for t in range(terms):
        left, product = [np.asarray(v[:, t], np.float64) for v in node.vectors], np.eye(n)
        for place, step in enumerate(node.steps):
            product = product @ one_step(step, left, n, (node.seed + place) % 2**32)
        total += product
    return total[: node.sizes[0], : node.sizes[1]]


def one_step(step, left, n, seed):
    if step == "diagonal":
        return np.diag(left.pop(0))
    if step in ("circulant", "skew"):
        v, wrap = left.pop(0), -1 if step == "skew" else 1
        return np.array([[v[j - i] if j >= i else wrap * v[j - i + n] for j in range(n)] for i in range(n)])
    if step == "hadamard":
        return scipy.linalg.hadamard(n) / np.sqrt(n)
    if step == "permutation":
        return np.eye(n)[:, np.argsort([hash_of(seed, i) for i in range(n)], kind="stable")]
    cosine = scipy.fft.dct(np.eye(n), norm="ortho")
    return cosine.T if step == "back" else cosine


FAST = [S.Toeplitz(2, sweeps=0), S.Fastfood(seed=3, sweeps=0), S.ACDC(layers=2, sweeps=0)]


@pytest.mark.parametrize("shape", [(24, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("method", FAST, ids=repr)
def test_fast_products_are_those_of_the_dense_definition(method, shape):
    node = method(matrix(shape))
    vectors = tuple(matrix(v.shape, seed=i) for i, v in enumerate(node.vectors))
    node = FastProduct(vectors, node.steps, node.sizes, node.seed)
    np.testing.assert_allclose(node.materialize(), dense_steps(node), atol=2e-5)
    x = matrix((5, shape[0]), seed=9)
    np.testing.assert_allclose(node.multiply(x), x @ dense_steps(node), atol=2e-4)


@pytest.mark.parametrize(("block", "seed"), [(None, None), (8, None), (4, 5)])
def test_circulant_products_are_those_of_the_dense_matrix(block, seed):
    node, x = S.Circulant(block, seed)(matrix((24, 16))), matrix((2, 5, 24), seed=1)
    np.testing.assert_allclose(node.multiply(x), x @ node.materialize(), atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 20), (20, 12), (12, 20)], ids=str)
def test_toeplitz_matrices_and_their_inverses_are_of_rank_two(shape):
    rng = np.random.default_rng(0)
    t = scipy.linalg.toeplitz(rng.normal(size=shape[0]) + 6 * np.eye(shape[0])[0], rng.normal(size=shape[1]))
    for w in (t, np.linalg.inv(t)) if shape[0] == shape[1] else (t,):
        assert error(S.Toeplitz(2)(jnp.asarray(w, jnp.float32)), w) < 2e-6


def test_the_displacement_has_the_rank():
    w = np.asarray(S.Toeplitz(3, sweeps=1)(matrix((20, 20))).materialize(), np.float64)
    shift = np.roll(np.eye(20), 1, axis=1)
    skew = shift * np.where(np.arange(20)[:, None] == 19, -1, 1)
    sizes = np.linalg.svd(shift @ w - w @ skew, compute_uv=False)
    assert sizes[2] > 1e-2 and sizes[3] < 1e-4 * sizes[0]


def test_no_matrix_is_farther_than_the_nearest_toeplitz_one():
    w = np.asarray(matrix((20, 14)))
    means = {d: np.diagonal(w, d).mean() for d in range(-19, 14)}
    nearest = np.array([[means[j - i] for j in range(14)] for i in range(20)])
    found = S.Toeplitz(2)(jnp.asarray(w))
    assert error(found, w) <= np.linalg.norm(nearest - w) / np.linalg.norm(w)


def test_sweeps_bring_an_acdc_matrix_back_and_never_lead_away():
    vectors = matrix((20, 1)), matrix((20, 1), seed=1)
    w = FastProduct(vectors, ("diagonal", "cosine", "diagonal", "back"), (20, 20)).materialize()
    node = S.ACDC(sweeps=0, seed=1)(w)
    errors = [error(node, w)]
    sweep = jax.jit(lambda node, w: node.project(w))
    for _ in range(20):
        node = sweep(node, w)
        errors.append(error(node, w))
    assert errors[-1] < 1e-3
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(errors))


def test_only_what_a_mask_shows_counts():
    w = matrix()
    shown = jnp.abs(w) > 0.5
    for method in (S.Hashed(0.2), S.Circulant(8)):
        a, b = (method(jnp.where(shown, w, rest), jc.Context(where=shown)) for rest in (0.0, 9.0))
        np.testing.assert_allclose(a.values, b.values, atol=1e-5)


MISTAKES = [
    (lambda: S.Hashed(ratio=0.0), r"Hashed: ratio=0.0 must be in \(0, 1\]"),
    (lambda: S.Hashed(ratio=1.5), r"Hashed: ratio=1.5 must be in \(0, 1\]"),
    (lambda: S.Hashed(seed=-1), "Hashed: seed=-1 must be an integer"),
    (lambda: S.Circulant(block=0), "Circulant: block=0 must be a positive integer"),
    (lambda: S.Toeplitz(rank=0), "Toeplitz: rank=0 must be a positive integer"),
    (lambda: S.ACDC(layers=0), "ACDC: layers=0 must be a positive integer"),
    (lambda: S.HashedFrequencies(decay=-1.0), "HashedFrequencies: decay=-1.0"),
    (lambda: plan(S.Circulant(block=5)), r"w: Circulant found block=5 for an array of shape \(24, 16\); use a number"),
    (lambda: plan(S.Toeplitz(rank=25)), r"w: Toeplitz found rank=25, expected at most 24"),
    (lambda: plan(S.HashedFrequencies()), r"w: HashedFrequencies found shape \(24, 16\), expected a convolution"),
    (lambda: plan(S.Fastfood(), (7,)), r"w: Fastfood needs a matrix, found shape \(7,\)"),
    (lambda: Gathered(jnp.ones(3), (2, 2), "hash", (4,), 0).materialize(), r"found values \(3,\), expected \(..., 4\)"),
]


def plan(method, shape=(24, 16)):
    return jc.plan({"w": jnp.ones(shape)}, [("w", method)])


@pytest.mark.parametrize(("make", "told"), MISTAKES, ids=[told[:30] for _, told in MISTAKES])
def test_mistakes_are_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()


LARGE = [S.Circulant(), S.Circulant(seed=1), S.Toeplitz(1, sweeps=0), S.Fastfood(sweeps=0), S.ACDC(sweeps=0)]


@pytest.mark.parametrize("method", LARGE, ids=repr)
def test_fast_transforms_under_accelerate_give_the_dense_product(method):
    params, x = {"w": matrix((1024, 1000))}, matrix((2, 3, 1024), seed=1)
    for layout, fn in (
        (jc.Layout(), lambda p, x: (x @ p["w"], x[..., :1000] @ p["w"].T, jnp.einsum("io,bci->obc", p["w"], x))),
        (jc.Layout(inputs=1, outputs=0), lambda p, x: (x[..., :1000] @ p["w"].T, x @ p["w"])),
    ):
        small = jc.compress(params, jc.plan(params, [("w", method)], layout={"w": layout}))
        fast = jc.accelerate(fn)
        assert all("fast transforms" in row.how for row in fast.report(small, x).rows)
        for y, dense in zip(fast(small, x), fn(jc.materialize(small), x), strict=True):
            np.testing.assert_allclose(y, dense, atol=2e-4 * float(jnp.abs(dense).max()))


def test_small_and_hashed_ones_are_made_dense():
    params, fn = {"w": matrix()}, lambda p, x: x @ p["w"]
    for method in (S.Circulant(), S.Hashed()):
        small = jc.compress(params, jc.plan(params, [("w", method)]))
        (row,) = jc.accelerate(fn).report(small, matrix((3, 24))).rows
        assert row.how == "dense: Gathered is made dense"


# One bank of values for all leaves


BANK = S.Hashed(ratio=0.25, seed=5, scope="global")


def bank_of(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}


def test_one_bank_serves_leaves_of_all_shapes_and_is_stored_once(tmp_path):
    params = bank_of({"a": (16, 8), "b": (3, 3, 4, 5), "c": (40,)})
    small = jc.compress(params, jc.plan(params, [(".*", BANK)]))
    size = sum(x.size for x in params.values())
    assert jc.nbits(small) == 32 * round(0.25 * size)
    assert small["b"].values == jc.formats.Reference("a/values", sizes=(round(0.25 * size),))
    train, held = jc.split(small)
    assert len(jax.tree.leaves(train)) == 1

    def error(train, arrays):
        dense = jc.materialize(jc.merge(train, held))
        return sum(jnp.sum((dense[k] - x) ** 2) for k, x in arrays.items())

    # The gradient of the one bank is the sum over all uses, and vanishes at the least squares.
    np.testing.assert_allclose(jax.tree.leaves(jax.grad(error)(train, params))[0], 0, atol=1e-4)
    other = bank_of({k: x.shape for k, x in params.items()}, seed=1)
    again = jc.split(core.projected(small, other))[0]
    np.testing.assert_allclose(jax.tree.leaves(jax.grad(error)(again, other))[0], 0, atol=1e-4)
    jc.save(tmp_path / "x.jc", small)
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(jc.load(tmp_path / "x.jc")), jc.materialize(small))


def test_a_bank_trains_in_the_usual_loops():
    params = bank_of({"a": (12, 8), "b": (8, 4)})
    x = bank_of({"x": (64, 12)}, seed=2)["x"]
    plan = jc.plan(params, [(".*", BANK)])
    target = jnp.tanh(x @ params["a"]) @ params["b"]

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - target) ** 2)

    tx = optax.chain(optax.adam(0.03), jc.project(plan))
    state, p = tx.init(params), jc.materialize(jc.compress(params, plan))
    before, step = loss(p), jax.jit(jax.grad(loss))
    for _ in range(150):
        updates, state = tx.update(step(p), state, p)
        p = optax.apply_updates(p, updates)
    assert loss(p) < 0.6 * before
    small = jc.nodes(p, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jc.materialize(small), p)
    assert jc.nbits(small) == 32 * round(0.25 * (96 + 32))


def test_a_bank_of_stacked_layers_and_of_narrow_floats():
    params = bank_of({"a": (3, 8, 4), "b": (3, 4, 4)})
    small = jc.compress(params, jc.plan(params, [(".*", jc.stacked(BANK))]))
    one = {k: x[1] for k, x in params.items()}
    alone = jc.materialize(jc.compress(one, jc.plan(one, [(".*", BANK)])))
    dense = jc.materialize(small)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6), dense, alone)
    both = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8), jnp.bfloat16)}
    found = jc.materialize(jc.compress(both, jc.plan(both, [(".*", BANK)])))
    assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in both.items()}
    with pytest.raises(ValueError, match="Hashed: scope='all' is unknown"):
        S.Hashed(scope="all")
