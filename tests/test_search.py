"""Search for masks, and fronts of several objectives."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jcompress import measure
from jcompress.prune import search
from jcompress.prune.search.distributions import policy_gradient

KEY = jax.random.key(5)


@cache
def planted():
    """A fitness with interactions on 12 bits, its value at all 4096 masks, and its best mask."""
    rng = np.random.default_rng(2)
    pairs = jnp.asarray(np.triu(rng.normal(size=(12, 12))), jnp.float32)

    def fitness(mask):
        bits = mask.astype(jnp.float32)
        return bits @ pairs @ bits

    masks = np.array(list(itertools.product([False, True], repeat=12)))
    values = np.asarray(jax.vmap(fitness)(jnp.asarray(masks)))
    return fitness, masks, values


@pytest.mark.parametrize("selection", ["tournament", "roulette"])
def test_the_genetic_search_finds_what_exhaustive_search_finds_and_never_falls(selection):
    fitness, masks, values = planted()
    found = jax.jit(lambda key: search.genetic(fitness, key, 12, generations=60, selection=selection))(KEY)
    np.testing.assert_array_equal(found.best, masks[values.argmax()])
    np.testing.assert_allclose(found.fitness, values.max(), rtol=1e-5)
    assert bool((jnp.diff(found.history) >= 0).all())


def test_the_best_mask_is_told_where_without_elites_the_population_loses_it():
    fitness, _, _ = planted()
    found = search.genetic(fitness, KEY, 12, population=8, generations=60, elites=0, mutation=0.3)
    assert bool((jnp.diff(found.history) >= 0).all())
    np.testing.assert_allclose(fitness(found.best), found.history[-1], rtol=1e-5)


@pytest.mark.parametrize("search_by", [search.pbil, search.reinforce])
def test_a_distribution_that_moves_finds_what_exhaustive_search_finds(search_by):
    fitness, masks, values = planted()
    found = jax.jit(lambda key: search_by(fitness, key, 12, generations=120))(KEY)
    np.testing.assert_array_equal(found.best, masks[values.argmax()])
    np.testing.assert_allclose(found.fitness, values.max(), rtol=1e-5)
    assert bool((jnp.diff(found.history) >= 0).all())
    partly = search_by(lambda mask: jnp.where(mask[0], jnp.nan, fitness(mask)), KEY, 12, generations=60)
    assert not partly.best[0] and partly.fitness > 0.9 * values[~masks[:, 0]].max()
    nothing = search_by(lambda mask: jnp.nan, KEY, 12, generations=3)
    assert nothing.fitness == -jnp.inf and not nothing.best.any()


def test_the_policy_gradient_is_that_of_the_expected_fitness():
    rng = np.random.default_rng(0)
    logits, values = jnp.asarray(rng.normal(size=3), jnp.float32), jnp.asarray(rng.normal(size=8), jnp.float32)
    masks = jnp.array(list(itertools.product([False, True], repeat=3)))

    def chances(logits):
        p = jax.nn.sigmoid(logits)
        return jnp.prod(jnp.where(masks, p, 1 - p), -1)

    want = jax.grad(lambda z: chances(z) @ values)(logits)
    pairs = jnp.array(list(itertools.product(range(8), repeat=2)))  # every generation of two, with its chance
    each = jax.vmap(lambda i: policy_gradient(jax.nn.sigmoid(logits), masks[i], values[i]))(pairs)
    found = jnp.prod(chances(logits)[pairs], -1) @ each
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_the_reward_of_a_student_pays_for_size_less_and_less():
    rewards = [search.n2n_reward(size, 0.9, 0.9) for size in (1.0, 0.5, 0.1, 0.01)]
    np.testing.assert_allclose(rewards, [0, 0.75, 0.99, 0.9999])
    np.testing.assert_allclose(search.n2n_reward(0.5, 0.45, 0.9), 0.375)


def test_searches_of_distributions_say_what_does_not_fit():
    fitness = planted()[0]
    for call, told in (
        (lambda: search.pbil(fitness, KEY, 12, best=65), "best=65 must be in 1 .. population=64"),
        (lambda: search.pbil(fitness, KEY, 12, rate=0.0), "rate=0.0 must be in"),
        (lambda: search.reinforce(fitness, KEY, 12, population=1), "population=1 must be at least 2"),
        (lambda: search.reinforce(fitness, KEY, 12, density=1.0), "density=1.0 must be in"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


@pytest.mark.parametrize("swap", [True, False])
def test_annealing_finds_the_best_mask(swap):
    fitness, masks, values = planted()
    start = jnp.arange(12) < 5
    cooling = optax.exponential_decay(3.0, 60, 0.5)
    found = jax.jit(lambda key: search.anneal(fitness, key, start, cooling, steps=400, swap=swap))(KEY)
    allowed = values if not swap else np.where(masks.sum(1) == 5, values, -np.inf)
    np.testing.assert_array_equal(found.best, masks[allowed.argmax()])
    assert bool((jnp.diff(found.history) >= 0).all())


def test_swaps_have_nothing_to_do_on_a_full_or_empty_mask():
    for start in (jnp.ones(4, bool), jnp.zeros(4, bool)):
        found = search.anneal(lambda mask: -mask.sum().astype(jnp.float32), KEY, start, 1.0, steps=10)
        np.testing.assert_array_equal(found.best, start)


def test_the_swarm_converges_on_the_sphere():
    centre = jnp.linspace(-0.8, 0.8, 6)
    found = search.particle_swarm(lambda x: -jnp.sum((x - centre) ** 2), KEY, 6, steps=250)
    np.testing.assert_allclose(found.best, centre, atol=1e-3)
    assert bool((jnp.diff(found.history) >= 0).all())


def test_the_swarm_finds_a_planted_mask():
    fitness, masks, values = planted()
    found = search.particle_swarm(lambda x: fitness(x > 0), KEY, 12, particles=256, steps=100)
    np.testing.assert_array_equal(found.best > 0, masks[values.argmax()])


# Particle filter.


def test_weights_are_normalised_and_the_effective_number_is_in_range():
    fitness, _, values = planted()
    found = search.particle_filter(lambda mask: -fitness(mask), KEY, 12, particles=200, steps=40)
    np.testing.assert_allclose(found.weights.sum(), 1, rtol=1e-5)
    assert bool((found.weights >= 0).all())
    assert bool(((found.effective >= 1 - 1e-4) & (found.effective <= 200 * (1 + 1e-4))).all())
    assert float(found.weights @ jax.vmap(fitness)(found.masks)) > np.quantile(values, 0.99)


def test_equal_errors_leave_all_particles_effective():
    found = search.particle_filter(lambda mask: jnp.zeros(()), KEY, 5, particles=32, steps=4)
    np.testing.assert_allclose(found.effective, 32, rtol=1e-5)
    np.testing.assert_allclose(found.weights, 1 / 32, rtol=1e-6)


def test_one_step_weighs_by_the_error():
    found = search.particle_filter(lambda mask: 0.1 * mask.sum(), KEY, 5, particles=64, steps=1)
    expected = np.exp(-0.1 * np.asarray(found.masks).sum(1))
    np.testing.assert_allclose(found.weights, expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.effective[0], 1 / np.square(expected / expected.sum()).sum(), rtol=1e-4)


def test_systematic_resampling_draws_each_as_often_as_it_weighs(rng):
    weights = rng.random(20)
    weights[[3, 9]] = 0
    counts = np.bincount(search.systematic(KEY, jnp.asarray(weights, jnp.float32)), minlength=20)
    exact = 20 * weights / weights.sum()
    assert (counts >= np.floor(exact - 1e-4)).all()
    assert (counts <= np.ceil(exact + 1e-4)).all()


# Several objectives.


def ranks_by_force(scores):
    rank, left, now = np.full(len(scores), -1), set(range(len(scores))), 0
    while left:
        front = {
            i
            for i in left
            if not any((scores[j] >= scores[i]).all() and (scores[j] > scores[i]).any() for j in left - {i})
        }
        for i in front:
            rank[i] = now
        left, now = left - front, now + 1
    return rank


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_ranks_are_those_of_comparing_all_pairs(objectives, rng):
    scores = rng.integers(0, 6, size=(40, objectives)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(measure.ranks)(jnp.asarray(scores)), ranks_by_force(scores))


def test_crowding_is_the_sum_of_gaps_within_a_front():
    scores = jnp.array([[0.0, 8.0], [1.0, 5.0], [4.0, 4.0], [8.0, 0.0], [0.5, 3.0]])
    rank = measure.ranks(scores)
    assert rank.tolist() == [0, 0, 0, 0, 1]
    found = measure.crowding(scores, rank)
    np.testing.assert_allclose(found, [np.inf, 4 / 8 + 4 / 8, 7 / 8 + 5 / 8, np.inf, np.inf])


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_hypervolume_is_the_part_of_the_box_that_is_beaten(objectives, rng):
    scores = rng.integers(1, 6, size=(7, objectives))
    cells = np.array(list(itertools.product(range(6), repeat=objectives)))
    beaten = (scores[:, None] >= cells[None] + 1).all(-1).any(0).sum()
    assert measure.hypervolume(scores, np.zeros(objectives)) == beaten
    assert measure.hypervolume(scores, np.full(objectives, 9)) == 0


def test_the_front_of_a_knapsack_is_that_of_all_masks():
    rng = np.random.default_rng(4)
    values, sizes = (jnp.asarray(rng.integers(1, 9, 10), jnp.float32) for _ in range(2))

    def objectives(mask):
        return jnp.stack([mask @ values, -(mask @ sizes)])

    front = jax.jit(lambda key: search.genetic_front(objectives, key, 10, population=64, generations=60))(KEY)
    everything = np.array(list(itertools.product([False, True], repeat=10)))
    scores = np.asarray(jax.vmap(objectives)(jnp.asarray(everything)))
    floor = np.array([-1.0, float(-sizes.sum()) - 1])
    best = measure.hypervolume(scores, floor)
    assert measure.hypervolume(front.scores, floor) > 0.995 * best
    np.testing.assert_allclose(front.scores, jax.vmap(objectives)(front.masks))
    np.testing.assert_array_equal(front.rank, ranks_by_force(np.asarray(front.scores)))


def test_wrong_hyperparameters_are_refused():
    with pytest.raises(ValueError, match="genetic: selection='best' is unknown; use 'tournament' or 'roulette'"):
        search.genetic(lambda mask: mask.sum(), KEY, 4, selection="best")
    with pytest.raises(ValueError, match=r"genetic: elites=9 must be in 0 .* population=8"):
        search.genetic(lambda mask: mask.sum(), KEY, 4, population=8, elites=9)


def test_amc_finds_more_than_random_policies_and_never_exceeds_its_budget():
    rng = np.random.default_rng(0)
    hurts, costs = jnp.asarray(10 ** rng.uniform(-2, 0, 8), jnp.float32), rng.uniform(1, 5, 8)
    budget, least = 0.5 * costs.sum(), 0.1

    def fitness(keep):
        spent = keep @ jnp.asarray(costs, jnp.float32)
        # A policy over budget, were one tried, would be the best.
        return jnp.where(spent > budget * (1 + 1e-6), 1e3, -hurts @ (1 - keep) ** 2)

    def run(key, **options):
        return search.amc(fitness, key, costs, budget, least=least, **options)

    keys = jax.random.split(KEY, 4)
    learned, random = (jax.jit(jax.vmap(lambda key: run(key, **o)))(keys) for o in ({}, {"warmup": 400}))  # noqa: B023
    # The optimum, by the multiplier of the budget, which makes all slopes equal inside the bounds.
    low, high = 0.0, 1e3
    for _ in range(200):
        price = (low + high) / 2
        keep = np.clip(1 - price * costs / (2 * np.asarray(hurts)), least, 1)
        low, high = (price, high) if keep @ costs > budget else (low, price)
    best = -float(np.asarray(hurts) @ (1 - keep) ** 2)
    uniform = float(fitness(jnp.full(8, 0.5)))
    assert float(learned.fitness.max()) <= best + 1e-5
    assert float(random.fitness.max()) <= best + 1e-5
    assert bool((jnp.diff(learned.history) >= 0).all())
    assert bool(((learned.best >= least) & (learned.best <= 1)).all())
    assert float(learned.fitness.mean()) > float(random.fitness.mean()) > uniform
    # Of what uniform fractions lose, most is won back.
    assert best - float(learned.fitness.mean()) < 0.2 * (best - uniform)


def test_amc_names_what_is_wrong():
    with pytest.raises(ValueError, match="lower least"):
        search.amc(lambda keep: keep.sum(), KEY, [1.0, 1.0], 0.1)
    with pytest.raises(ValueError, match=r"warmup=9 must be in 0 .. episodes=5"):
        search.amc(lambda keep: keep.sum(), KEY, [1.0], 1.0, episodes=5, warmup=9)
    with pytest.raises(ValueError, match="memory=1 must hold an episode, 2 transitions"):
        search.amc(lambda keep: keep.sum(), KEY, [1.0, 1.0], 1.0, memory=1)
    with pytest.raises(ValueError, match=r"features of shape \(3, 1\), expected \(2, n\)"):
        search.amc(lambda keep: keep.sum(), KEY, [1.0, 1.0], 1.0, features=jnp.ones((3, 1)))


@pytest.mark.parametrize("elites", [0, 2])
def test_genetic_returns_the_best_ever_met(elites):
    """Every mask flips half its bits, so that the last generation is as good as chance."""
    met = []

    def fitness(mask):
        value = jnp.where(mask[0] & mask[1] & mask[2], jnp.nan, (mask * jnp.arange(10.0)).sum())
        jax.debug.callback(lambda x: met.append(float(x)), value)
        return value

    found = search.genetic(fitness, jax.random.key(1), 10, population=6, generations=12, elites=elites, mutation=0.5)
    jax.effects_barrier()
    best = np.nanmax(met)
    assert float(found.fitness) == best == float((found.best * np.arange(10.0)).sum())
    assert found.history.shape == (12,) and (np.diff(found.history) >= 0).all() and found.history[-1] == best


def test_weight_agnostic_networks_are_the_front_of_all_masks():
    """Two inputs, two hidden units: xor by any shared positive weight needs six connections of the eight."""
    x = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    wanted = jnp.array([0.0, 1.0, 1.0, 0.0])

    def score(mask, weight):
        first, second, direct = mask[:4].reshape(2, 2), mask[4:6], mask[6:]
        hidden = jnp.stack([jnp.tanh(weight * x @ first[:, 0]), jnp.cos(weight * x @ first[:, 1])], -1)
        out = hidden @ second + x @ direct
        return -jnp.square(out - wanted).mean()

    weights = (0.5, 1.0, 2.0)
    objectives = search.weight_agnostic(score, weights)
    every = jnp.asarray(list(itertools.product([False, True], repeat=8)))
    scores = np.asarray(jax.vmap(objectives)(every))
    by_hand = np.array([[float(score(mask, w)) for w in weights] for mask in np.asarray(every[::37])])
    np.testing.assert_allclose(scores[::37, 0], by_hand.mean(1), rtol=1e-5)
    np.testing.assert_allclose(scores[::37, 1], by_hand.max(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores[:, 2], -np.asarray(every).mean(1), rtol=1e-6)
    front = scores[[not ((scores >= s).all(1) & (scores > s).any(1)).any() for s in scores]]
    found = search.genetic_front(objectives, KEY, 8, population=48, generations=60)
    assert (np.asarray(found.rank) == 0).any()
    for s in np.asarray(found.scores)[np.asarray(found.rank) == 0]:
        assert np.isclose(front, s, atol=1e-5).all(1).any()


def test_a_fitness_of_nan_is_never_the_best():
    key, values = jax.random.key(0), jnp.array([1.0, 5.0, 3.0, 2.0, 4.0])
    start = jnp.array([True, True, False, False, False])
    cold = search.anneal(lambda m: jnp.where(m[1], jnp.nan, m @ values), key, start, 0.5, steps=100)
    assert cold.best.tolist() == [False, False, True, False, True] and float(cold.fitness) == 7.0
    swarm = search.particle_swarm(lambda x: jnp.where(x.sum() > 1.2, jnp.nan, -jnp.sum((x - 0.5) ** 2)), key, 2)
    np.testing.assert_allclose(swarm.best, 0.5, atol=1e-2)

    def ends(m):
        return jnp.stack([jnp.where(m[0], jnp.nan, m.mean()), -m.mean()])

    assert not bool(search.genetic_front(ends, key, 4, generations=5).masks[:, 0].any())
    drawn = search.particle_filter(lambda m: jnp.where(m[0], jnp.nan, 1.0), key, 4)
    assert float(drawn.weights.sum()) == pytest.approx(1)


def test_fitnesses_of_64_bits_are_taken():
    with jax.enable_x64(True):
        worth = jnp.array([1.0, -0.3, 1.0, -0.4])
        assert worth.dtype == jnp.float64
        for find in (search.pbil, search.reinforce, search.genetic):
            found = find(lambda mask: mask @ worth, KEY, 4, generations=50)
            assert found.best.tolist() == [True, False, True, False]
        search.particle_filter(lambda mask: (~mask) @ worth, KEY, 4, steps=3)
        kept = search.amc(lambda keep: keep @ worth, KEY, [1.0, 1.0, 1.0, 1.0], 2.0, episodes=12, warmup=6)
        assert kept.best.sum() <= 2.0
