"""Sharing that is trained: soft k-means and its gradients, soft weight sharing, rows tied by GrOWL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.numeric import soft_clusters
from jcompress.prune import penalties

KEY = jax.random.key(0)
SoftKMeans, Mixture = jc.share.SoftKMeans, jc.share.Mixture


def drawn(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def clustered(rng, n=40, d=1):
    return drawn(rng, n, d) * 0.1 + jnp.asarray(rng.choice([-1.0, 0.3, 1.2], size=(n, 1)), jnp.float32)


def solved(x, start, gradient, iterations):
    return soft_clusters.fixed_words(x, start, 0.3, iterations, gradient)


@pytest.mark.parametrize("d", [1, 3])
def test_the_implicit_gradient_is_that_of_many_rounds_and_of_differences(rng, d):
    x, start = clustered(rng, 40, d), drawn(rng, 3, d)
    weight = drawn(rng, 3, d)

    def loss(x, gradient, iterations=200):
        return jnp.sum(weight * solved(x, start, gradient, iterations))

    implicit, unrolled, free = (jax.grad(loss)(x, name) for name in ("implicit", "unrolled", "jacobian_free"))
    np.testing.assert_allclose(implicit, unrolled, atol=2e-4)
    change = drawn(rng, 40, d)
    ends = [float(loss(x + s * 1e-2 * change, "implicit")) for s in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, jnp.sum(implicit * change), rtol=2e-2, atol=2e-3)
    assert float(jnp.sum(free * implicit)) > 0  # a descent direction, if not the gradient
    assert float(jnp.abs(free - implicit).max()) > 1e-3


def test_a_fixed_point_moves_no_more_and_hardens(rng):
    x = clustered(rng)
    words = solved(x, x[:3], "implicit", 300)
    np.testing.assert_allclose(soft_clusters.moved(x, words, 0.3), words, atol=1e-5)
    hard = soft_clusters.assignments(x, words, 1e-4)
    np.testing.assert_allclose(hard.max(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(hard.argmax(-1), jnp.abs(x - words[:, 0]).argmin(-1))


def test_memory_does_not_grow_with_the_rounds(rng):
    x, start = drawn(rng, 2000, 1), drawn(rng, 16, 1)

    def memory(gradient, iterations):
        slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(solved(x, start, gradient, iterations)))))
        return slope.lower(x).compile().memory_analysis().temp_size_in_bytes

    for gradient in ("implicit", "jacobian_free"):
        assert memory(gradient, 64) <= 1.01 * memory(gradient, 4)
    assert memory("unrolled", 64) > 8 * memory("unrolled", 4)


@pytest.mark.parametrize("gradient", ["implicit", "jacobian_free", "unrolled", "trained"])
def test_a_whole_loop_ends_in_a_codebook_that_fits(rng, gradient, tmp_path):
    x, target = drawn(rng, 64, 6), jnp.asarray(rng.choice([-1.0, 0.5, 2.0], size=(6, 4)), jnp.float32)
    params = {"w": target + 0.3 * drawn(rng, 6, 4)}
    method = SoftKMeans(clusters=3, gradient=gradient, iterations=10, temperatures=(0.3, 0.02), steps=150)
    tree = jc.compress(params, jc.plan(params, [("w", method)]))
    train, held = jc.split(tree)
    tx = optax.adam(0.02)

    def loss(train, step):
        told = jc.prune.bayesian.at_step(jc.merge(train, held), step)
        return jnp.mean(jnp.square(x @ (jc.materialize(told, key=KEY)["w"] - target)))

    @jax.jit
    def update(train, state, step):
        value, grads = jax.value_and_grad(loss)(train, step)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, value

    state, first = tx.init(train), None
    for step in range(150):
        train, state, value = update(train, state, step)
        first = value if first is None else first
    small = jc.finalize(jc.prune.bayesian.at_step(jc.merge(train, held), 150))
    assert isinstance(small["w"], jc.formats.Codebook)
    end = float(jnp.mean(jnp.square(x @ (jc.materialize(small)["w"] - target))))
    assert end < 0.2 * float(first)
    jc.save(tmp_path / "small.jc", small)
    assert jc.nbits(small) == 2 * 24 + 3 * 32


def test_the_mean_of_assignments_costs_bits(rng):
    """Soft-to-hard quantization: at a high temperature words are shared softly, at a low one not."""
    node = SoftKMeans(4, gradient="trained", temperatures=(1.0, 1e-5), steps=10)(drawn(rng, 8, 8))
    soft, hard = (dataclasses.replace(node, step=jnp.int32(step)).materialize(key=KEY) for step in (0, 10))
    np.testing.assert_allclose(hard, node.materialize(), atol=1e-4)
    assert float(jnp.abs(soft - hard).max()) > 0.1
    grads = jax.grad(lambda c: jnp.sum(dataclasses.replace(node, codebook=c).materialize() * 3))(node.codebook)
    np.testing.assert_allclose(grads.sum(), 3 * 64, rtol=1e-5)


def test_likelihoods_are_those_of_scipy_and_their_gradients_responsibilities(rng):
    stats = pytest.importorskip("scipy.stats")
    w = drawn(rng, 7, 3)
    mixture = Mixture(drawn(rng, 4), 0.3 * drawn(rng, 4), drawn(rng, 4), zero=0.7)
    share, mean, deviation = (np.asarray(x, np.float64) for x in (
        mixture.share(), mixture.centers(), jnp.exp(mixture.log_deviations)))  # fmt: skip
    np.testing.assert_allclose([share.sum(), share[0], mean[0]], [1, 0.7, 0], rtol=1e-6)
    parts = share * stats.norm.pdf(np.asarray(w)[..., None], mean, deviation)
    np.testing.assert_allclose(mixture.loss({"w": w}), -np.log(parts.sum(-1)).sum(), rtol=1e-5)
    own = parts / parts.sum(-1, keepdims=True)
    expected = (own * (np.asarray(w)[..., None] - mean) / deviation**2).sum(-1)
    np.testing.assert_allclose(jax.grad(lambda w: mixture.loss({"w": w}))(w), expected, rtol=1e-4, atol=1e-5)


def test_narrow_components_stay_finite():
    mixture = Mixture(jnp.array([0.0, 1.0]), jnp.log(jnp.array([1e-6, 1e-6])), jnp.zeros(2))
    value, slope = jax.value_and_grad(lambda w: mixture.loss({"w": w}))(jnp.array([0.0, 1.0, 0.5]))
    assert bool(jnp.isfinite(value)) and bool(jnp.isfinite(slope).all())


def test_merging_keeps_mass_mean_and_variance():
    mixture = Mixture(
        jnp.array([0.0, 1.0, 1.05, -2.0]),
        jnp.log(jnp.array([0.1, 0.2, 0.3, 0.1])),
        jnp.array([0.0, 0.3, 0.1, 0.2]),
        0.5,
    )

    def moments(m):
        share, mean = (np.asarray(x, np.float64) for x in (m.share(), m.centers()))
        second = np.exp(2 * np.asarray(m.log_deviations, np.float64)) + mean**2
        return share.sum(), share @ mean, share @ second

    merged = mixture.merged(divergence=0.05)
    assert len(merged.means) == 3
    np.testing.assert_allclose(moments(merged), moments(mixture), rtol=1e-5)
    np.testing.assert_allclose(merged.share()[0], 0.5, rtol=1e-6)
    assert len(mixture.merged(1e-6).means) == 4
    alone = mixture.merged(1e9)
    assert len(alone.means) == 1 and float(alone.centers()[0]) == 0


def test_soft_sharing_in_a_whole_loop(rng, tmp_path):
    """A network that three values solve is found, by weights and mixture trained together."""
    x, truth = drawn(rng, 128, 8), jnp.asarray(rng.choice([0.0, -1.0, 1.5], size=(8, 4)), jnp.float32)
    params = {"w": truth + 0.25 * drawn(rng, 8, 4)}
    mixture = Mixture.spread(params, components=6, zero=0.4)
    tx = optax.adam(0.02)

    @jax.jit
    def update(both, state):
        def loss(both):
            params, mixture = both
            return 50 * jnp.mean(jnp.square(x @ (params["w"] - truth))) + 0.05 * mixture.loss(params)

        updates, state = tx.update(jax.grad(loss)(both), state, both)
        params, mixture = optax.apply_updates(both, updates)
        floor = jnp.maximum(mixture.log_deviations, jnp.log(0.02))
        return (params, dataclasses.replace(mixture, log_deviations=floor)), state

    both = (params, mixture)
    state = tx.init(both)
    for _ in range(400):
        both, state = update(both, state)
    params, mixture = both
    few = mixture.merged(divergence=0.05)
    small = jc.compress(params, jc.plan(params, [("w", jc.share.ByMixture(few))]))
    assert len(few.means) < 6
    assert float(jnp.abs(jc.materialize(small)["w"] - truth).max()) < 0.1
    jc.save(tmp_path / "small.jc", small)


def test_one_codebook_of_a_mixture_for_all_leaves(rng):
    params = {"a": drawn(rng, 4, 4), "b": drawn(rng, 6, 2)}
    mixture = Mixture(jnp.array([0.0, -1.0, 1.0]), jnp.full(3, -1.0), jnp.zeros(3), 0.5)
    small = jc.compress(params, jc.plan(params, [(".*", jc.share.ByMixture(mixture))]))
    assert jc.nbits(small) == 2 * 28 + 3 * 32
    dense = jc.materialize(small)
    for name, w in params.items():
        nearest = jnp.argmax(mixture.log_densities(w), -1)
        np.testing.assert_array_equal(dense[name] == 0, nearest == 0)


def test_rows_that_are_alike_are_stored_once(rng):
    words = drawn(rng, 3, 5).at[0].set(0.0)
    places = np.array([1, 2, 0, 1, 1, 2, 0, 2])
    w = words[places] + 1e-4 * drawn(rng, 8, 5)
    node = jc.share.TiedRows(least=0.01)(w)
    assert node.clusters == 3
    assert node.nbits() == 2 * 8 + 3 * 5 * 32
    np.testing.assert_allclose(node.materialize(), words[places], atol=5e-4)
    np.testing.assert_array_equal(node.materialize()[2], 0)
    assert jc.share.TiedRows(similarity=1.0, least=0.0)(drawn(rng, 8, 5)).clusters == 8
    alike = jc.share.TiedRows()(jnp.stack([words[1], 2 * words[1], -words[1]]))  # by direction
    assert alike.indices.ravel().tolist() == [0, 0, 1]


def test_growl_ties_rows_of_inputs_that_are_alike(rng):
    """Correlated inputs get one row, useless ones none, and the ties are kept in training on."""
    z = drawn(rng, 400, 2)
    x = jnp.concatenate([z[:, :1] + 0.01 * drawn(rng, 400, 3), z[:, 1:] + 0.01 * drawn(rng, 400, 3)], 1)
    x = jnp.concatenate([x, drawn(rng, 400, 2)], 1)
    y = z @ jnp.array([[3.0, -3.0, 1.0], [1.0, 2.0, 2.0]])
    loss = lambda p: 0.5 * jnp.mean(jnp.sum(jnp.square(x @ p["w"] - y), -1))  # noqa: E731
    tx = optax.chain(optax.sgd(0.2), penalties.proximal(penalties.GrOWL(0.05, 0.02), 0.2))
    params = {"w": 0.1 * drawn(rng, 8, 3)}

    @jax.jit
    def update(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(300):
        params, state = update(params, state)
    small = jc.compress(params, jc.plan(params, [("w", jc.share.TiedRows())]))
    groups = small["w"].indices.ravel().tolist()
    assert groups == [0, 0, 0, 1, 1, 1, 2, 2]
    np.testing.assert_array_equal(jc.materialize(small)["w"][6:], 0)
    train, held = jc.split(small)
    slope = jax.grad(lambda t: loss(jc.materialize(jc.merge(t, held))))(train)["w"].codebook
    dense = jax.grad(loss)(jc.materialize(small))["w"]
    np.testing.assert_allclose(slope[0], dense[:3].sum(0), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftKMeans(clusters=0), "clusters=0"),
        (lambda: SoftKMeans(gradient="exact"), "gradient='exact'"),
        (lambda: SoftKMeans(block=(3, 1))(jnp.ones((4, 4)), jc.Context(path="a/w")), r"a/w: SoftKMeans found block"),
        (lambda: Mixture.spread({"w": jnp.ones(3)}, components=1), "components=1"),
        (lambda: Mixture.spread({"w": jnp.ones(3)}, match="v"), "matches no parameter"),
        (lambda: jc.share.TiedRows(similarity=2.0), "similarity=2.0"),
        (lambda: jc.share.TiedRows()(jnp.ones(4), jc.Context(path="b")), "b: TiedRows needs inputs and outputs"),
        (lambda: jax.jit(jc.share.TiedRows())(jnp.ones((4, 4))), "outside jit only"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
