"""Stochastic gates and posteriors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, stats

import jcompress as jc
from jcompress.formats import gaussian, horseshoe
from jcompress.prune import bayesian

KEY = jax.random.key(3)


def samples(node, count, key=KEY):
    return np.asarray(jax.jit(jax.vmap(lambda k: node.materialize(key=k)))(jax.random.split(key, count)), np.float64)


def with_fields(node, **fields):
    return dataclasses.replace(node, **{name: jnp.asarray(x, jnp.float32) for name, x in fields.items()})


# Hard concrete.


def test_the_probability_of_a_gate_is_the_fraction_of_samples_that_are_not_zero():
    logits = np.array([-4.0, -1.0, 0.0, 2.0, 5.0])
    node = jc.formats.Gated(values=jnp.ones(5), log_alpha=jnp.asarray(logits, jnp.float32))
    drawn = samples(node, 40_000)
    assert drawn.min() == 0
    assert drawn.max() == 1
    np.testing.assert_allclose((drawn != 0).mean(0), node.probability(), atol=0.01)
    np.testing.assert_allclose(node.penalty(), node.probability().sum(), rtol=1e-6)


def test_the_gate_of_test_time_is_the_clipped_and_stretched_sigmoid():
    logits = np.array([-9.0, -2.0, 0.3, 9.0])
    node = jc.formats.Gated(values=jnp.ones(4), log_alpha=jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(node.materialize(), np.clip(1.2 / (1 + np.exp(-logits)) - 0.1, 0, 1), atol=1e-6)
    assert jc.finalize(node).mask.tolist() == [False, True, True, True]


def test_a_shared_gate_counts_all_weights_behind_it():
    tree = {"a": jc.prune.HardConcrete(axes=(-2,), keep=0.5)(jnp.ones((6, 3))), "b": jnp.ones(4)}
    each = 1 / (1 + np.exp(2 / 3 * np.log(0.1 / 1.1)))
    np.testing.assert_allclose(bayesian.penalty(tree), 18 * each, rtol=1e-5)
    gradient = jax.grad(lambda t: bayesian.penalty(jc.merge(t, jc.split(tree)[1])))(jc.split(tree)[0])
    assert bool((gradient["a"].log_alpha > 0).all())
    drawn = tree["a"].materialize(key=KEY)
    np.testing.assert_array_equal(drawn, np.broadcast_to(drawn[:1], drawn.shape))


# Sparse variational dropout.


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 5.0, 50.0])
def test_the_divergence_is_near_the_exact_integral(alpha):
    def integrand(t):
        return stats.norm.pdf([-np.exp(t), np.exp(t)], 1, np.sqrt(alpha)).sum() * t * np.exp(t)

    exact = integrate.quad(integrand, -30, np.log(1 + 12 * np.sqrt(alpha)), limit=200)[0]
    # As alpha grows the divergence tends to its constant, half of Euler's constant and log 2.
    exact += 0.5 * (np.euler_gamma + np.log(2)) - 0.5 * np.log(alpha)
    assert abs(float(gaussian.log_uniform_divergence(jnp.log(alpha))) - exact) < 0.009


def test_weights_of_high_dropout_rate_go_and_cost_nothing():
    node = jc.formats.Gaussian(mean=jnp.array([2.0, 1.0, 0.1, 0.1]), log_variance=jnp.array([0.0, 2.99, 0.0, -3.0]))
    mean = np.asarray(node.mean)
    np.testing.assert_allclose(node.log_alpha(), np.asarray(node.log_variance) - 2 * np.log(mean), rtol=1e-5)
    assert jc.finalize(node).mask.tolist() == [True, True, False, True]
    assert float(gaussian.log_uniform_divergence(jnp.array(30.0))) < 1e-6


def test_local_reparametrization_has_the_moments_of_sampled_weights(rng):
    node = jc.formats.Gaussian(
        mean=jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        log_variance=jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
    )
    x = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    keys = jax.random.split(KEY, 20_000)
    local = jax.jit(jax.vmap(lambda k: bayesian.local_reparametrization(node, x, k)))(keys)
    weights = jax.jit(jax.vmap(lambda k: x @ node.materialize(key=k)))(keys)
    np.testing.assert_allclose(local.mean(0), weights.mean(0), atol=0.1)
    np.testing.assert_allclose(local.var(0), weights.var(0), rtol=0.06)
    still = jax.grad(lambda x: bayesian.local_reparametrization(node, x, KEY).sum())(jnp.zeros((1, 5)))
    assert bool(jnp.isfinite(still).all())


# Bayesian compression.


@pytest.mark.parametrize(("mean", "log_variance", "scale"), [(0.0, -1.0, 1.0), (-1.5, 0.3, 0.5)])
def test_divergences_of_log_normals_are_the_integrals(mean, log_variance, scale):
    deviation = np.exp(0.5 * log_variance)
    priors = [stats.gamma(0.5, scale=scale**2), stats.invgamma(0.5)]

    def exact(prior):
        def integrand(t):
            # The density of the log of the variable is the prior's times the variable.
            q = stats.norm.logpdf(t, mean, deviation)
            return np.exp(q) * (q - prior.logpdf(np.exp(t)) - t)

        return integrate.quad(integrand, mean - 12 * deviation, mean + 12 * deviation, limit=200)[0]

    found = horseshoe.gamma_divergence(jnp.full(2, mean), jnp.full(2, log_variance), scale)
    np.testing.assert_allclose(found, [exact(prior) for prior in priors], rtol=1e-4)


@pytest.fixture
def scaled(rng):
    node = jc.prune.BayesianCompression()(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32))
    return with_fields(
        node,
        log_variance=np.full((4, 3), -2.0),
        group_mean=rng.normal(size=(4, 1, 2)) * 0.3,
        group_log_variance=np.full((4, 1, 2), -1.5),
        array_mean=[[[0.2, -0.1]]],
        array_log_variance=[[[-2.0, -2.5]]],
    )


@pytest.fixture
def improper(rng):
    node = jc.prune.NormalJeffreys(threshold=3.0)(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32))
    return with_fields(
        node,
        log_variance=np.full((4, 3), -2.0),
        group_mean=[[0.7], [-1.2], [0.4], [1.5]],
        group_log_variance=np.full((4, 1), -1.5),
    )


@pytest.mark.parametrize("prior", ["scaled", "improper"])
def test_moments_are_those_of_samples_and_the_mean_is_what_is_served(prior, request):
    scaled = request.getfixturevalue(prior)
    drawn = samples(scaled, 60_000)
    mean, variance = scaled.moments()
    np.testing.assert_allclose(mean, drawn.mean(0), atol=0.05)
    np.testing.assert_allclose(variance, drawn.var(0), rtol=0.12)
    np.testing.assert_allclose(scaled.materialize(), mean, rtol=1e-6)


def test_a_group_that_goes_is_cut_exactly_from_the_mean_network(scaled, rng):
    node = with_fields(scaled, group_mean=scaled.group_mean.at[1].set(-6.0))
    final = jc.finalize(node)
    keep = np.asarray(final.mask).ravel()
    assert keep.tolist() == [True, False, True, True]
    x = rng.normal(size=(5, 4)).astype(np.float32)
    w = np.asarray(final.materialize())
    np.testing.assert_allclose(x @ w, x[:, keep] @ w[keep], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w[keep], np.asarray(node.moments()[0])[keep], rtol=1e-6)


@pytest.mark.parametrize("tau", [1e-5, 0.1])
def test_the_horseshoe_starts_near_its_prior(tau, rng):
    """All that can move without moving a scale lies where the divergence is least; the heavy tail pays for the rest."""
    w = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    node = jc.prune.BayesianCompression(tau=tau)(w)
    np.testing.assert_allclose(node.log_mode(), -np.exp(-9.0), rtol=1e-3)
    slopes = jax.grad(lambda node: node.penalty())(node)
    np.testing.assert_allclose(slopes.array_mean, 0, atol=1e-3)
    np.testing.assert_allclose(slopes.group_mean[..., 0], 0, atol=1e-3)
    weights = 0.5 * (np.square(np.asarray(w)) + np.exp(-9.0) - 1 + 9).sum()
    tail = 6 * np.log(1 / tau)  # a scale of 1 / tau under a half Cauchy law, of density like its inverse square
    assert abs(float(node.penalty()) - weights - tail) < 6 * 4 * 9


@pytest.mark.parametrize("scale", [0.3, -2.0])
def test_the_normal_jeffreys_divergence_is_that_of_weights_given_scales_and_of_the_scales(scale, improper):
    """Given a scale both laws of a weight are Gaussian, and their divergence does not depend on it."""
    mean, deviation = np.asarray(improper.mean, np.float64).ravel(), np.exp(-1.0)

    def weight(m):
        posterior, prior = stats.norm(scale * m, abs(scale) * deviation), stats.norm(0, abs(scale))
        ends = posterior.mean() - 10 * posterior.std(), posterior.mean() + 10 * posterior.std()
        return integrate.quad(lambda w: posterior.pdf(w) * (posterior.logpdf(w) - prior.logpdf(w)), *ends, limit=200)[0]

    log_alpha = -1.5 - np.log(np.square([0.7, 1.2, 0.4, 1.5]))
    np.testing.assert_allclose(improper.log_alpha().ravel(), log_alpha, rtol=1e-5)
    scales = gaussian.log_uniform_divergence(jnp.asarray(log_alpha, jnp.float32)).sum()
    np.testing.assert_allclose(improper.penalty(), sum(map(weight, mean)) + scales, rtol=1e-4)


def test_scales_of_high_dropout_rate_go_and_are_cut_exactly_from_the_mean_network(improper, rng):
    node = with_fields(improper, group_mean=[[0.7], [-1.2], [0.1], [1.5]])  # log alpha of the third is 3.1
    final = jc.finalize(node)
    keep = np.asarray(final.mask).ravel()
    assert keep.tolist() == [True, True, False, True]
    x = rng.normal(size=(5, 4)).astype(np.float32)
    w = np.asarray(final.materialize())
    np.testing.assert_allclose(x @ w, x[:, keep] @ w[keep], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w[keep], np.asarray(node.group_mean * node.mean)[keep], rtol=1e-6)


@pytest.mark.parametrize("prior", ["scaled", "improper"])
def test_groups_and_then_the_bits_of_the_posterior_each_save_storage(prior, request):
    node, pair = request.getfixturevalue(prior), {"scaled": [[-6.0, -6.0]], "improper": [0.01]}[prior]
    node = with_fields(node, group_mean=node.group_mean.at[1].set(jnp.array(pair[0])))
    bits = bayesian.bit_widths({"w": node})["w"]
    pruned = jc.finalize({"w": node})["w"]
    short = jc.chain(
        jc.prune.Magnitude(sparsity=0.25, pattern=jc.prune.Block((1, None))), jc.quantize.Int(bits, axis=None)
    )
    dense = 32 * node.mean.size
    assert 1 <= bits <= 8
    assert jc.nbits(short(pruned.materialize())) < jc.nbits(pruned) < dense


def test_rounding_to_the_bit_width_errs_by_one_deviation_at_most(rng):
    mean = jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)
    found = []
    for deviation in (0.3, 0.05, 0.01):
        node = jc.formats.Gaussian(mean=mean, log_variance=jnp.full((40, 8), 2 * np.log(deviation)), threshold=99.0)
        found.append(bayesian.bit_widths({"w": node})["w"])
        step = float(mean.max() - mean.min()) / (2 ** found[-1] - 1)
        assert step / 2 <= deviation < step * 1.01
    assert found == sorted(found)
    gone = jc.formats.Gaussian(mean=jnp.ones(3), log_variance=jnp.full(3, 9.0))
    assert bayesian.bit_widths({"w": gone, "b": jnp.ones(2)}) == {"w": 1}


# Information bottleneck.


def test_the_bottleneck_costs_the_divergence_from_the_nearest_prior():
    node = jc.prune.InformationBottleneck()(jnp.ones((2, 1)))
    mean, variance = 0.7, 0.2
    node = with_fields(node, mean=[[mean]], log_variance=[[np.log(variance)]])
    prior = np.linspace(0.05, 5, 20_000)
    divergence = 0.5 * (np.log(prior / variance) + (variance + mean**2) / prior - 1)
    np.testing.assert_allclose(node.penalty(), divergence.min(), rtol=1e-5)
    assert float(with_fields(node, mean=[[0.0]]).penalty()) == 0
    costs = np.array([float(with_fields(node, mean=[[np.sqrt(r)]]).penalty()) for r in np.linspace(0.1, 4, 9)])
    assert (np.diff(costs) > 0).all()
    assert (np.diff(costs, 2) < 0).all()


# Annealed channels.


def test_cold_gates_are_exactly_k_ones_and_do_not_see_scale_or_shift(rng):
    w = jnp.asarray(rng.normal(size=(3, 3, 4, 10)), jnp.float32)
    node = jc.prune.AnnealedChannels(sparsity=0.7, steps=100, at_least=2)(w)
    node = with_fields(node, logits=rng.normal(size=(1, 1, 1, 10)))
    cold = bayesian.at_step({"w": node}, 100)["w"]
    gate = np.asarray(cold.gate()).ravel()
    assert ((gate > 0.99).sum(), (gate < 0.01).sum()) == (3, 7)
    np.testing.assert_allclose(cold.materialize(key=KEY), cold.materialize(), atol=1e-5)
    moved = with_fields(node, logits=5 * node.logits - 2)
    np.testing.assert_allclose(moved.gate(), node.gate(), atol=1e-5)
    assert float(jnp.max(node.gate()) - jnp.min(node.gate())) < 0.99


def test_annealed_gates_train_and_the_masked_network_is_the_cut_one(rng):
    w = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    node = jc.prune.AnnealedChannels(sparsity=0.5, steps=10, at_least=1)(w)
    train, held = jc.split(node)
    gradient = jax.grad(lambda t: (jc.merge(t, held).materialize(key=KEY) ** 2).sum())(train)
    assert bool((gradient.logits != 0).any())
    final = jc.finalize(node)
    keep = np.asarray(final.mask).ravel()
    assert keep.sum() == 3
    x = rng.normal(size=(5, 4)).astype(np.float32)
    y = x @ np.asarray(final.materialize())
    np.testing.assert_array_equal(y[:, ~keep], 0)
    np.testing.assert_allclose(y[:, keep], x @ np.asarray(w)[:, keep], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sparsity", "value"), [(0.0, 1.0), (1.0, 0.0)])
def test_all_channels_or_none(sparsity, value):
    node = jc.prune.AnnealedChannels(sparsity=sparsity, steps=10, at_least=0)(jnp.ones((2, 3)))
    np.testing.assert_array_equal(node.gate(), np.full((1, 3), value))


# All of them train.


TRAINED = {
    "hard-concrete": (jc.prune.HardConcrete(axes=(-1,), keep=0.7), 0.02),
    "variational-dropout": (jc.prune.VariationalDropout(), 0.02),
    "bayesian-compression": (jc.prune.BayesianCompression(tau=1e-2, start=-5.0, threshold=1.0), 0.02),
    "normal-jeffreys": (jc.prune.NormalJeffreys(), 0.02),
    "bottleneck": (jc.prune.InformationBottleneck(axes=(-1,), start=-3.0), 0.02),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_prunes_inputs_that_do_not_matter(name, rng):
    method, strength = TRAINED[name]
    x = jnp.asarray(rng.normal(size=(128, 8)), jnp.float32)
    truth = np.zeros((8, 1), np.float32)
    truth[:3] = [[2.0], [-1.5], [1.0]]
    start = {"w": jnp.asarray(truth + 0.05 * rng.normal(size=(8, 1)), jnp.float32)}
    train, held = jc.split(jc.compress(start, jc.plan(start, [("w", method)])))
    tx = optax.adam(0.05)

    def loss(train, key):
        tree = jc.merge(train, held)
        return jnp.mean((x @ jc.materialize(tree, key=key)["w"] - x @ truth) ** 2) + strength * bayesian.penalty(tree)

    @jax.jit
    def run(train):
        def step(carry, key):
            train, state = carry
            updates, state = tx.update(jax.grad(loss)(train, key), state, train)
            return (optax.apply_updates(train, updates), state), None

        return jax.lax.scan(step, (train, tx.init(train)), jax.random.split(KEY, 600))[0][0]

    final = jc.finalize(jc.merge(run(train), held))["w"]
    assert np.broadcast_to(final.mask, (8, 1)).ravel().tolist() == [True] * 3 + [False] * 5
    np.testing.assert_allclose(final.materialize()[:3], truth[:3], atol=0.35)


# A support prior with structure.


def chain_by_force(evidence, density, run):
    n, leave = len(evidence), 1 / run
    enter = leave * density / (1 - density)
    move = np.array([[1 - enter, enter], [leave, 1 - leave]])
    total, marginal = 0.0, np.zeros(n)
    for s in itertools.product([0, 1], repeat=n):
        p = (density if s[0] else 1 - density) * np.exp(np.dot(s, evidence))
        for a, b in itertools.pairwise(s):
            p *= move[a, b]
        total, marginal = total + p, marginal + p * np.array(s)
    return marginal / total


def test_sum_product_gives_the_marginals_of_all_1024_supports(rng):
    evidence = rng.normal(size=10) * 2
    exact = chain_by_force(evidence, 0.3, 4.0)
    found, extrinsic = jax.jit(bayesian.chain_posterior)(jnp.asarray(evidence, jnp.float32), 0.3, 4.0)
    np.testing.assert_allclose(found, exact, atol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(extrinsic + evidence), exact, atol=1e-5)


def test_a_chain_without_memory_is_the_independent_prior(rng):
    evidence = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    found, extrinsic = bayesian.chain_posterior(evidence, 0.25, 1 / 0.75, axis=0)
    np.testing.assert_allclose(extrinsic, np.full((3, 7), np.log(0.25 / 0.75)), atol=1e-5)
    np.testing.assert_allclose(found, jax.nn.sigmoid(evidence + np.log(0.25 / 0.75)), atol=1e-6)


def test_planted_runs_are_found_better_than_one_by_one(rng):
    support, w = planted_runs(rng, 0.4)
    evidence, density = bayesian.gaussian_evidence(w, 1.0, 0.16), support.mean()

    def f1(run):
        found = np.asarray(bayesian.chain_posterior(evidence, density, run)[0]) > 0.5
        return 2 * (found & support).sum() / (found.sum() + support.sum())

    assert f1(12.0) > f1(1 / (1 - density)) + 0.15


def planted_runs(rng, deviation):
    support = np.zeros((20, 100), bool)
    for row in support:
        for start in rng.choice(80, 2):
            row[start : start + 12] = True
    return support, jnp.asarray(rng.normal(size=support.shape) * np.where(support, 1.0, deviation), jnp.float32)


def test_the_bound_never_falls_and_lies_below_the_evidence(rng):
    """The evidence of three weights by brute force: over supports, and an integral over each precision."""
    w, variance, kept, pruned = np.array([0.9, 0.2, -0.03]), 0.01, (1.0, 1.0), (2.0, 0.01)
    found = bayesian.structured_posterior(jnp.asarray(w, jnp.float32), variance, 0.4, 3.0, kept=kept, pruned=pruned)

    def likelihood(x, shape, rate):
        def integrand(t):
            # The density of the log of the precision.
            return (
                stats.gamma.pdf(np.exp(t), shape, scale=1 / rate)
                * np.exp(t)
                * stats.norm.pdf(x, 0, np.sqrt(variance + np.exp(-t)))
            )

        return integrate.quad(integrand, -15, 15, limit=200)[0]

    each = np.array([[likelihood(x, *law) for law in (pruned, kept)] for x in w])
    leave = 1 / 3
    enter = leave * 0.4 / 0.6
    move, message = np.array([[1 - enter, enter], [leave, 1 - leave]]), np.array([0.6, 0.4]) * each[0]
    for row in each[1:]:
        message = (message @ move) * row
    assert float(found.bound[-1]) < np.log(message.sum()) < float(found.bound[-1]) + 1.5
    assert bool((jnp.diff(found.bound) >= -1e-4).all())
    assert float(found.bound[-1]) > float(found.bound[0])


def test_the_whole_prior_finds_planted_runs_and_its_bound_rises(rng):
    support, w = planted_runs(rng, 0.05)

    def found(run):
        return bayesian.structured_posterior(w, 1e-3, support.mean(), run, pruned=(4.0, 0.02))

    def f1(posterior):
        guess = np.asarray(posterior.probability) > 0.5
        return 2 * (guess & support).sum() / (guess.sum() + support.sum())

    structured, alone = found(12.0), found(1 / (1 - support.mean()))
    assert f1(structured) > max(0.97, f1(alone))
    for posterior in (structured, alone):
        size = np.abs(posterior.bound[-1])
        assert bool((jnp.diff(posterior.bound) >= -1e-5 * size).all())
    shrunk = np.abs(structured.mean) / np.abs(w)
    assert shrunk[support].mean() > 0.9 > shrunk[~support].mean()


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jc.prune.HardConcrete(keep=0.05), "keep=0.05, expected it in"),
        (lambda: jc.prune.HardConcrete(stretch=(0.0, 1.0)), "stretch from below 0"),
        (lambda: jc.prune.VariationalDropout(start=4.0), "start=4.0 is not below threshold"),
        (lambda: jc.prune.InformationBottleneck(start=1.0), "start=1.0 is not below threshold"),
        (lambda: jc.prune.BayesianCompression(tau=0.0), "tau=0.0 must be positive"),
        (lambda: jc.prune.NormalJeffreys(start=3.0), "NormalJeffreys: start=3.0 is not below threshold=-3.0"),
        (lambda: jc.prune.AnnealedChannels(sparsity=2.0, steps=3), "sparsity=2.0"),
        (lambda: bayesian.chain_posterior(jnp.ones(3), 0.9, 2.0), "run=2.0 is too short for density=0.9; use 9"),
        (lambda: bayesian.chain_posterior(jnp.ones(3), 1.0, 2.0), r"density=1.0 is outside \(0, 1\)"),
    ],
)
def test_values_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_axes_that_the_array_lacks_are_named():
    params = {"layer": {"bias": jnp.ones(4)}}
    for method in (jc.prune.HardConcrete, jc.prune.NormalJeffreys):
        with pytest.raises(ValueError, match=rf"layer/bias: {method.__name__} needs negative axes .* found \[-2\]"):
            jc.plan(params, [(".*", method(axes=(-2,)))])


def test_nodes_nest(rng):
    w = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    for method, _ in TRAINED.values():
        node = jc.chain(method, jc.quantize.Float())(w)
        again = node.project(2 * w)
        assert jax.tree.structure(again) == jax.tree.structure(node)
        np.testing.assert_allclose(again.materialize(), 2 * w, rtol=0.02)
        assert float(bayesian.penalty({"w": node})) > 0
        np.testing.assert_array_equal(jc.finalize(node).materialize(), node.materialize())
