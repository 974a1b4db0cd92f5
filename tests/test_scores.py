"""Scores of weights by data, by the loss and by the network, each against what it claims to be."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jcompress as jc
from jcompress.prune import Block, ByScore, Sampled, Wanda, scores


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def mlp(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]


def small_mlp(rng, sizes=(5, 7, 6, 4)):
    return {name: normal(rng, n, m) / n**0.5 for name, n, m in zip("abc", sizes, sizes[1:], strict=False)}


def flat_of(params):
    return jax.flatten_util.ravel_pytree(params)[0]


# Wanda


def test_wanda_is_magnitude_times_input_norm_compared_by_outputs(rng):
    params, x = {"w": normal(rng, 8, 5)}, normal(rng, 30, 8) * jnp.arange(1.0, 9.0)
    plan = jc.plan(params, [("w", Wanda(sparsity=0.5))])
    stats = jc.calibrate(lambda p, x: x @ p["w"], params, [x], plan=plan)
    mask = jc.compress(params, plan, stats=stats)["w"].mask
    by_hand = np.abs(np.asarray(params["w"])) * np.linalg.norm(np.asarray(x), axis=0)[:, None]
    np.testing.assert_array_equal(mask, by_hand >= np.sort(by_hand, axis=0)[4])
    two_of_four = jc.plan(params, [("w", Wanda(pattern=jc.prune.NM(2, 4)))])
    np.testing.assert_array_equal(
        jc.compress(params, two_of_four, stats=stats)["w"].mask, jc.prune.NM(2, 4).mask(jnp.asarray(by_hand))
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_wanda_is_the_change_of_the_output_when_one_weight_of_a_convolution_is_cut(groups, rng):
    def fn(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "VALID", dimension_numbers=dims, feature_group_count=groups
        )

    params, x = {"w": normal(rng, 2, 2, 4 // groups, 6)}, normal(rng, 3, 4, 4, 4)
    stats = jc.calibrate(fn, params, [x], statistics=["norm"])
    score = scores.evaluate(jc.prune.Wanda(0.5).score, params["w"], jc.Context(stats=stats["w"], path="w"))
    for place in [(0, 1, 1, 2), (1, 0, 0, 5), (1, 1, 1, 3)]:
        cut = fn({"w": params["w"].at[place].set(0)}, x) - fn(params, x)
        np.testing.assert_allclose(score[place], jnp.linalg.norm(cut), rtol=1e-5)
    mask = Wanda(0.5)(params["w"], jc.Context(stats=stats["w"])).mask
    assert (mask.sum((0, 1, 2)) == 8 // groups).all()


def test_wanda_of_stacked_layers_is_wanda_of_each(rng):
    def fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    params, x = {"w": normal(rng, 3, 6, 6)}, normal(rng, 9, 6)
    stats = jc.calibrate(fn, params, [x], statistics=["norm"])
    mask = jc.compress(params, jc.plan(params, [("w", Wanda(0.5))]), stats=stats)["w"].mask
    stacked = jc.compress(params, jc.plan(params, [("w", jc.stacked(Wanda(0.5)))]), stats=stats)["w"].mask
    for i in range(3):
        layer = jc.calibrate(lambda p, x: x @ p["w"], {"w": params["w"][i]}, [x], statistics=["norm"])
        np.testing.assert_array_equal(Wanda(0.5)(params["w"][i], jc.Context(stats=layer["w"])).mask, mask[i])
        x = jnp.tanh(x @ params["w"][i])
    np.testing.assert_array_equal(stacked, mask)


def test_wanda_says_what_it_misses(rng):
    params = {"w": normal(rng, 4, 4)}
    plan = jc.plan(params, [("w", Wanda(0.5))])
    with pytest.raises(ValueError, match=r"w: Wanda needs 'stats.norm', which is missing; pass stats=jc.calibrate"):
        jc.compress(params, plan)
    wrong = jc.trace.Stats(square=jnp.ones(3), axes=(-2,))
    with pytest.raises(ValueError, match=r"w: found 'norm' of shape \(3,\) for a kernel of shape \(4, 4\)"):
        jc.compress(params, plan, stats={"w": wrong})
    with pytest.raises(ValueError, match="w: the statistics name no contracted axes"):
        jc.compress(params, plan, stats={"w": jc.trace.Stats(square=jnp.ones(4))})


# From gradients


def test_snip_is_the_gradient_of_a_gate_and_ranks_all_leaves_together(rng):
    params, x = small_mlp(rng), normal(rng, 10, 5)

    def gated(gates):
        return (mlp(jax.tree.map(jnp.multiply, params, gates), x) ** 2).sum()

    sensitivity = jax.tree.map(jnp.abs, jax.grad(gated)(jax.tree.map(jnp.ones_like, params)))
    grads = jax.grad(lambda p: (mlp(p, x) ** 2).sum())(params)
    small = jc.compress(params, jc.plan(params, [(".*", jc.prune.SNIP(sparsity=0.7))]), grads=grads)
    flat = np.sort(np.asarray(flat_of(sensitivity)))
    for name in params:
        np.testing.assert_array_equal(small[name].mask, np.asarray(sensitivity[name]) >= flat[round(0.7 * len(flat))])


def test_snip_sums_do_not_see_the_scale_of_a_layer_of_relus_and_collapse_at_extreme_sparsity(rng):
    params, x = small_mlp(rng, (20, 40, 40, 4)), normal(rng, 30, 20)
    y = jnp.asarray(rng.integers(0, 4, 30))

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(mlp(params, x), y).mean()

    def sensitivity(params):
        return jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss)(params))

    moved = {"a": 4 * params["a"], "b": params["b"] / 4, "c": params["c"]}
    for name, found in sensitivity(moved).items():
        np.testing.assert_allclose(found, sensitivity(params)[name], rtol=1e-4, atol=1e-9)
    for sparsity, alive in ((0.8, True), (0.999, False)):
        plan = jc.plan(params, [(".*", jc.prune.SNIP(sparsity=sparsity))])
        small = jc.materialize(jc.compress(params, plan, grads=jax.grad(loss)(params)))
        assert all(bool((w != 0).any()) for w in jax.tree.leaves(small)) == alive
    # Three weights are left: synaptic flow makes a path of them.
    assert [int(mask.sum()) for mask in jc.prune.synflow(mlp, params, 0.999, x[:1]).values()] == [1, 1, 1]


def test_taylor_ranks_units_as_leaving_each_out_does_and_better_than_magnitude(rng):
    x = normal(rng, 200, 6)
    y = jnp.tanh(x[:, :1] * x[:, 1:2])
    params = {"a": normal(rng, 6, 24) / 2, "b": normal(rng, 24, 1) / 4}

    def loss(params, gates):
        return jnp.mean(((jax.nn.tanh(x @ params["a"]) * gates) @ params["b"] - y) ** 2)

    tx, ones = optax.adam(0.02), jnp.ones(24)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, ones), state, params)
        return (optax.apply_updates(params, updates), state), None

    trained = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), None, 150)[0][0])()
    out = jnp.abs(jax.vmap(lambda i: loss(trained, ones.at[i].set(0)))(jnp.arange(24)) - loss(trained, ones))
    exact = np.asarray(out)
    groups = {"hidden": jc.trace.Group(24, (("a", 1),), (("b", 0),))}
    # Example by example: at a minimum the derivatives of a batch add up to nothing.
    grads = jax.vmap(lambda i: jax.grad(lambda p: jnp.mean(((jnp.tanh(x[i] @ p["a"])) @ p["b"] - y[i]) ** 2))(trained))(
        jnp.arange(200)
    )
    taylor = jax.vmap(lambda g: jc.prune.structured.taylor(trained, groups, g)["hidden"])(grads).mean(0)
    magnitude = jc.prune.structured.l2(trained, groups)["hidden"]
    ranks = [scipy.stats.spearmanr(score, exact).statistic for score in (taylor, magnitude)]
    assert ranks[0] > max(0.8, ranks[1] + 0.1)


def test_taylor_fisher_and_obd_are_their_scores(rng):
    params, g, h = {"w": normal(rng, 6, 4)}, normal(rng, 6, 4), jnp.abs(normal(rng, 6, 4))
    stats = {"w": types.SimpleNamespace(grad_square=g**2, hessian_diagonal=h)}
    expected = {
        jc.prune.Taylor(0.5): jnp.abs(g * params["w"]),
        jc.prune.Fisher(0.5): g**2 * params["w"] ** 2,
        jc.prune.OBD(0.5): h * params["w"] ** 2,
    }
    for method, score in expected.items():
        small = jc.compress(params, jc.plan(params, [("w", method)]), grads={"w": g}, stats=stats)
        np.testing.assert_array_equal(small["w"].mask, score >= jnp.sort(score.ravel())[12])


def test_fisher_equals_obd_for_a_linear_gaussian_model(rng):
    """With unit noise the expected squared gradient of the log likelihood is its Hessian."""
    w, x = normal(rng, 3, 1), normal(rng, 4, 3)
    noise = normal(rng, 4000, 4, 1)
    draws = jnp.concatenate([noise, -noise]) / jnp.std(noise, axis=0)

    def loss(params, x, y):
        return 0.5 * ((x @ params["w"] - y) ** 2).sum()

    grads = jax.vmap(lambda e: jax.vmap(lambda x, e: jax.grad(loss)({"w": w}, x[None], x[None] @ w + e)["w"])(x, e))(
        draws[..., None]
    )
    fisher = jnp.square(grads).mean(0).sum(0)
    hessian = jnp.diag(x.T @ x)[:, None]
    a, b = types.SimpleNamespace(grad_square=fisher), types.SimpleNamespace(hessian_diagonal=hessian)
    np.testing.assert_allclose(scores.fisher(w, jc.Context(stats=a)), scores.hessian(w, jc.Context(stats=b)), rtol=2e-3)


def test_grasp_is_the_change_of_the_gradient_norm(rng):
    with jax.enable_x64():
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), small_mlp(rng, (3, 4, 3, 2)))
        x = jnp.asarray(rng.normal(size=(6, 3)))

        def loss(params, x):
            return jnp.tanh(mlp(params, x)).sum() ** 2 / 10

        table = jc.prune.grasp(loss, params, x)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        hessian, g = (d(lambda p: loss(unravel(p), x))(flat) for d in (jax.hessian, jax.grad))
        np.testing.assert_allclose(flat_of(table), flat * (hessian @ g), atol=1e-12)

        def norm(p):
            return (jax.grad(lambda q: loss(unravel(q), x))(p) ** 2).sum()

        for i in range(0, len(flat), 5):
            shrunk = norm(flat.at[i].multiply(1 - 1e-6)) - norm(flat)
            np.testing.assert_allclose(shrunk / 1e-6, -2 * flat_of(table)[i], rtol=1e-3, atol=1e-8)


def test_variance_nullity_cuts_noise_at_the_test_level_and_always_what_has_no_effect(rng):
    n = 12
    params = {"noise": jnp.ones(4000), "unused": jnp.ones(3), "strong": jnp.ones(3)}

    def loss(params, noise, strong):
        return (params["noise"] * noise).sum() + (params["strong"] * strong).sum()

    batch = normal(rng, n, 4000), 10 * normal(rng, n, 3)
    found = jc.prune.variance_nullity(loss, params, *batch, variance=1.0)
    want = scipy.stats.chi2.cdf((n - 1) * np.var(np.asarray(batch[0], np.float64), axis=0, ddof=1), n - 1)
    np.testing.assert_allclose(found["noise"], want, atol=1e-4)
    assert abs(float((found["noise"] < 0.05).mean()) - 0.05) < 0.015
    assert (found["unused"] == 0).all() and (found["strong"] > 0.99).all()
    with pytest.raises(ValueError, match="found 1 examples, expected at least two"):
        jc.prune.variance_nullity(loss, params, batch[0][:1], batch[1][:1], variance=1.0)


def test_what_a_unit_swings_alone_is_its_part_of_the_variance(rng):
    low, c = normal(rng, 6), jnp.array([1.0, -2.0, 0.0, 0.5, 3.0, 0.0])
    high = low + jnp.arange(1.0, 7.0)
    found = jax.jit(lambda low, high: jc.prune.fourier_variance(lambda z: c @ z + 7, low, high))(low, high)
    # A sine of amplitude a has the variance a**2 / 2.
    np.testing.assert_allclose(found, np.square(c * (high - low) / 2) / 2, rtol=1e-4, atol=1e-5)
    both = jc.prune.fourier_variance(lambda z: jnp.stack([c @ z, z[2]]), low, high)
    np.testing.assert_allclose(both - found, np.where(np.arange(6) == 2, 9 / 8, 0), rtol=1e-4, atol=1e-4)
    cheap = jc.prune.fourier_variance(lambda z: c @ z, low, high, frequency=13)
    np.testing.assert_allclose(cheap, found, rtol=1e-4, atol=1e-5)


def test_the_spectrum_gives_the_variance_of_the_mean_output_given_a_unit(rng):
    """By quadrature on all nodes: what swings as a sine is distributed as the points of Chebyshev."""
    low, high, v = normal(rng, 3) - 1, normal(rng, 3) + 1, normal(rng, 3, 8)

    def fn(z):
        return jnp.tanh(0.7 * z @ v).sum() + z[0] * z[1] + z[2] ** 2

    points = np.cos(np.pi * (np.arange(24) + 0.5) / 24)
    nodes = np.asarray((high + low) / 2) + np.outer(points, (high - low) / 2)
    grid = np.stack(np.meshgrid(*nodes.T, indexing="ij"), -1).reshape(-1, 3)
    values = np.asarray(jax.vmap(fn)(jnp.asarray(grid, jnp.float32)), np.float64).reshape(24, 24, 24)
    exact = [values.mean(tuple(j for j in range(3) if j != i)).var() for i in range(3)]
    np.testing.assert_allclose(jc.prune.fourier_variance(fn, low, high), exact, rtol=0.02)


def test_units_of_no_effect_go_first_behind_a_network(rng):
    params, x = small_mlp(rng, (5, 8, 6, 4)), normal(rng, 40, 5)
    dead = np.isin(np.arange(8), [1, 6])
    params["b"] = jnp.where(dead[:, None], 0, params["b"])
    hidden = jax.nn.relu(x @ params["a"])
    found = jc.prune.fourier_variance(
        lambda z: jax.nn.relu(z @ params["b"]) @ params["c"], hidden.min(0), hidden.max(0)
    )
    assert float(found[dead].max()) < 0.02 * float(found[~dead].min())
    for args, message in [
        ((jnp.zeros(3), jnp.ones(4)), r"found low \(3,\) and high \(4,\)"),
        ((jnp.zeros(()), jnp.ones(())), r"expected \(units,\) for both"),
    ]:
        with pytest.raises(ValueError, match=message):
            jc.prune.fourier_variance(jnp.sum, *args)
    for keywords in ({"frequency": 6}, {"harmonics": 0}):
        with pytest.raises(
            ValueError, match="expected harmonics of 1 or more and a frequency above twice their number"
        ):
            jc.prune.fourier_variance(jnp.sum, jnp.zeros(3), jnp.ones(3), **keywords)


def test_the_fisher_of_a_unit_is_that_of_its_activation(rng):
    params, x = small_mlp(rng), normal(rng, 6, 5)

    def head(hidden, p):
        return (jax.nn.relu(hidden @ p["b"]) @ p["c"]).sum() ** 2

    found = jc.prune.unit_fisher(lambda p, x: head(jax.nn.relu(x @ p["a"]), p), params, Block((None, 1)), x)
    hidden = jax.nn.relu(x @ params["a"])
    gates = jax.vmap(lambda h: h * jax.grad(lambda h: head(h[None], params))(h))(hidden)
    np.testing.assert_allclose(found["a"], jnp.broadcast_to((gates**2).sum(0) / 12, (5, 7)), rtol=1e-4)


# Over training


def test_movement_accumulates_minus_gradient_times_weight_and_prunes_what_shrinks():
    params = {"w": jnp.array([3.0, 0.5, -2.5, -0.4])}
    target = jnp.array([0.1, 2.0, -0.1, -2.0])
    tx = optax.chain(jc.prune.accumulate(scores.movement), optax.sgd(0.05))
    state, by_hand = tx.init(params), np.zeros(4)
    for _ in range(3):
        grads = jax.grad(lambda p: ((p["w"] - target) ** 2).sum())(params)
        by_hand += -np.asarray(grads["w"]) * np.asarray(params["w"])
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state[0].scores["w"], by_hand, rtol=1e-5)
    method = ByScore(0.5, score=scores.lookup(state[0].scores))
    assert jc.compress(params, jc.plan(params, [("w", method)]))["w"].mask.tolist() == [False, True, False, True]
    assert jc.prune.Magnitude(0.5)(params["w"]).mask.tolist() == [True, False, True, False]


def test_skeletonization_is_the_gradient_of_a_gate_on_a_relu_unit(rng):
    params, x = small_mlp(rng), normal(rng, 9, 5)

    def loss(params, gate):
        return (jax.nn.relu((jax.nn.relu(x @ params["a"]) * gate) @ params["b"]) @ params["c"]).sum() ** 2

    relevance = -jax.grad(loss, argnums=1)(params, jnp.ones(7))
    tx = jc.prune.accumulate(scores.movement, decay=0.8)
    state = tx.init(params)
    for steps in (1, 2):
        _, state = tx.update(jax.grad(loss)(params, jnp.ones(7)), state, params)
        np.testing.assert_allclose(state.scores["a"].sum(0), (1 - 0.8**steps) * relevance, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.scores["b"].sum(1), (1 - 0.8**steps) * relevance, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"decay=1.0 is outside \[0, 1\)"):
        jc.prune.accumulate(scores.movement, decay=1.0)
    with pytest.raises(ValueError, match="accumulate needs the parameters"):
        tx.update(params, state)


def test_karnin_is_gradient_times_weight_where_the_gradient_is_constant():
    w, g = jnp.array([5.0, -1.0, 2.0, 7.0]), jnp.array([3.0, -2.0, 0.5, 0.0])
    tx = optax.chain(optax.sgd(0.1), jc.prune.accumulate(lambda w, context: context.grad**2))
    params = {"w": w}
    state = tx.init(params)
    for _ in range(7):
        updates, state = tx.update({"w": g}, state, params)
        params = optax.apply_updates(params, updates)
    found = jc.prune.karnin(w, params["w"], state[1].scores["w"], 0.1)
    np.testing.assert_allclose(found, jnp.abs(g * params["w"]), rtol=1e-4)
    assert found[3] == 0


def test_weight_elimination_has_its_gradient_and_counts_non_zeros_in_the_limit(rng):
    params = {"w": normal(rng, 5, 3).at[0].set(0.0)}
    beta = 4.0
    got = jax.grad(lambda p: jc.prune.weight_elimination(p, beta**-0.5))(params)["w"]
    np.testing.assert_allclose(got, 2 * beta * params["w"] / (1 + beta * params["w"] ** 2) ** 2, rtol=1e-5)
    np.testing.assert_allclose(jc.prune.weight_elimination(params, 1e-6), 12, rtol=1e-5)


# By rank and by lot


def test_lamp_follows_its_definition_and_never_empties_a_leaf(rng):
    w = normal(rng, 4, 5)
    squares = np.asarray(w, np.float64).ravel() ** 2
    want = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(scores.layer_adaptive(w).ravel(), want, rtol=1e-5)
    params = {"small": 1e-3 * w, "large": 1e3 * normal(rng, 30, 5)}
    small = jc.compress(params, jc.plan(params, [(".*", ByScore(168 / 170, "global", score=scores.layer_adaptive))]))
    assert [int(node.mask.sum()) for node in small.values()] == [1, 1]
    assert (scores.layer_adaptive(jnp.zeros((2, 2))) == 0).all()


def test_a_table_of_scores_must_fit():
    method = ByScore(0.5, score=scores.lookup({"w": jnp.ones(3)}))
    for name, found in (("w", r"shape \(3,\)"), ("v", "no such path")):
        params = {name: jnp.ones(4)}
        with pytest.raises(ValueError, match=rf"{name}: looked for scores of shape \(4,\) and found {found}"):
            jc.compress(params, jc.plan(params, [(name, method)]))


def test_what_training_changed_against_its_formulas(rng):
    first, last = normal(rng, 6, 5), normal(rng, 6, 5)
    context = jc.Context(path="w")
    want = {
        "magnitude_increase": 0.5 * np.abs(last) - np.abs(first),
        "movement": np.abs(last - first),
        "large_init_large_final": np.minimum(0.5 * np.abs(last), np.abs(first)),
    }
    for name, value in want.items():
        score = jc.prune.scores.since({"w": first}, name, alpha=0.5)
        np.testing.assert_allclose(score(last, context), value, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(score, static_argnums=1)(last, context), value, rtol=1e-6)
    with pytest.raises(ValueError, match="since: change='size' is unknown; use one of magnitude_increase"):
        jc.prune.scores.since({"w": first}, "size")
    with pytest.raises(ValueError, match=r"w: looked for scores of shape .* and found no such path"):
        jc.prune.scores.since({"v": first})(last, context)


def test_a_weight_that_grew_is_kept_before_one_that_was_large(rng):
    x, w = normal(rng, 200, 10), jnp.where(jnp.arange(10) < 3, 1.0, 0.0)
    first = {"w": jnp.where(jnp.arange(10) < 3, 0.0, 2.0)}  # large where nothing is needed
    grad = jax.grad(lambda p: jnp.mean((x @ p["w"] - x @ w) ** 2))
    trained = first
    for _ in range(12):
        trained = jax.tree.map(lambda p, g: p - 0.05 * g, trained, grad(trained))

    def kept(score):
        method = jc.prune.ByScore(sparsity=0.7, score=score)
        return jc.compress(trained, jc.plan(trained, [("w", method)]))["w"].mask[:3].sum()

    assert kept(jc.prune.scores.since(first)) == 3 > kept(jc.prune.scores.magnitude)


def test_samples_follow_the_scores_and_their_number_is_exact():
    w = jnp.array([1.0, 2.0, 3.0, 0.0, 4.0])
    draw = jax.jit(jax.vmap(lambda key: Sampled(0.8)(w, jc.Context(key=key)).mask))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    assert (masks.sum(1) == 1).all()
    np.testing.assert_allclose(masks.mean(0), w / 10, atol=0.012)
    pairs = np.asarray(jax.jit(jax.vmap(lambda key: Sampled(0.6)(w, jc.Context(key=key)).mask))(
        jax.random.split(jax.random.key(1), 20_000)
    ))  # fmt: skip
    assert (pairs.sum(1) == 2).all()
    first_then_second = 0.1 * 0.4 / 0.9 + 0.4 * 0.1 / 0.6
    assert abs((pairs[:, 0] & pairs[:, 4]).mean() - first_then_second) < 0.01


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_a_reweighted_sample_is_an_unbiased_sketch(scope, rng):
    params = {"a": normal(rng, 4, 3), "b": normal(rng, 6)}
    plan = jc.plan(params, [(".*", Sampled(0.5, scope=scope, reweight=True))])
    draw = jax.jit(jax.vmap(lambda key: jc.materialize(jc.compress(params, plan, key=key))))
    drawn = draw(jax.random.split(jax.random.key(0), 20_000))
    assert (sum((x != 0).reshape(20_000, -1).sum(1) for x in drawn.values()) == 9).all()
    for name, w in params.items():
        error = np.asarray(drawn[name].std(0)) / 20_000**0.5
        np.testing.assert_array_less(np.abs(np.asarray(drawn[name].mean(0) - w)), 4.5 * error + 1e-6)


def test_a_sketch_varies_least_where_weights_are_drawn_in_proportion_to_what_they_add(rng):
    """Among scores of one weight, its product with the input is the best (Bar & Giryes 2023)."""
    w, x = normal(rng, 40), jnp.abs(normal(rng, 40)) * jnp.geomspace(0.05, 5, 40)

    def variance(score):
        method = Sampled(0.5, score=score, reweight=True)
        keys = jax.random.split(jax.random.key(0), 4_000)
        return float(jax.jit(jax.vmap(lambda key: method(w, jc.Context(key=key)).materialize() @ x))(keys).var())

    best = variance(lambda w, context: jnp.abs(w) * x)
    assert best < 0.5 * variance(scores.magnitude)
    assert best < 0.5 * variance(lambda w, context: jnp.ones_like(w))


def test_samples_need_one_draw_to_be_reweighted():
    with pytest.raises(ValueError, match="reweight=True needs one draw of single weights, found scope='output'"):
        Sampled(0.5, scope="output", reweight=True)
    with pytest.raises(ValueError, match="found pattern=NM"):
        Sampled(pattern=jc.prune.NM(2, 4), reweight=True)
    with pytest.raises(ValueError, match="w: Sampled needs 'key'"):
        jc.compress({"w": jnp.ones(4)}, jc.plan({"w": jnp.ones(4)}, [("w", Sampled(0.5))]))
    with pytest.raises(ValueError, match="w: Sampled needs 'grad'"):
        jc.compress({"w": jnp.ones(4)}, jc.plan({"w": jnp.ones(4)}, [("w", Sampled(0.5, score=scores.taylor))]))


# Synaptic flow


def test_synaptic_flow_is_conserved_over_layers_and_units(rng):
    params = small_mlp(rng)
    found = jc.prune.synflow_scores(mlp, params, jnp.zeros((1, 5)))
    flow = mlp(jax.tree.map(jnp.abs, params), jnp.ones((1, 5))).sum()
    for name in params:
        np.testing.assert_allclose(found[name].sum(), flow, rtol=1e-5)
    np.testing.assert_allclose(found["a"].sum(0), found["b"].sum(1), rtol=1e-5)
    np.testing.assert_allclose(found["b"].sum(0), found["c"].sum(1), rtol=1e-5)


def by_rounds(params, sparsity, rounds):
    """Synaptic flow in float64, round by round, with a sort."""
    weights = [np.abs(np.asarray(params[name], np.float64)) for name in "abc"]
    masks = [np.ones(w.shape, bool) for w in weights]
    total = sum(w.size for w in weights)
    for k in range(1, rounds + 1):
        a, b, c = (w * m for w, m in zip(weights, masks, strict=True))
        down = [np.ones(a.shape[0]), np.ones(a.shape[0]) @ a, np.ones(a.shape[0]) @ a @ b]
        up = [b @ c @ np.ones(c.shape[1]), c @ np.ones(c.shape[1]), np.ones(c.shape[1])]
        flows = [w * np.outer(d, u) for w, d, u in zip((a, b, c), down, up, strict=True)]
        flat = np.concatenate([np.where(m, f, -1).ravel() for f, m in zip(flows, masks, strict=True)])
        kept = max(round((1 - sparsity) ** (k / rounds) * total), total - round(sparsity * total))
        chosen = np.zeros(total, bool)
        chosen[np.argsort(-flat, kind="stable")[:kept]] = True
        masks = [
            x.reshape(m.shape)
            for x, m in zip(np.split(chosen, np.cumsum([m.size for m in masks])[:-1]), masks, strict=True)
        ]
    return masks


def test_synflow_equals_its_rounds_by_hand_and_the_count_is_exact(rng):
    params = small_mlp(rng, (6, 10, 9, 4))
    masks = jc.prune.synflow(mlp, params, 0.85, jnp.zeros((1, 6)), rounds=20)
    for name, want in zip("abc", by_rounds(params, 0.85, 20), strict=True):
        np.testing.assert_array_equal(masks[name], want)
    total = sum(w.size for w in params.values())
    assert sum(int(m.sum()) for m in masks.values()) == total - round(0.85 * total)
    table = ByScore(0.85, "global", score=scores.lookup(masks))
    small = jc.compress(params, jc.plan(params, [(".*", table)]))
    for name in params:
        np.testing.assert_array_equal(small[name].mask, masks[name])


def test_synflow_keeps_paths_where_one_round_collapses(rng):
    """A wide layer of small weights between narrow ones: one shot empties it, rounds do not."""
    params = {"a": normal(rng, 4, 200), "b": normal(rng, 200, 200) / 50, "c": normal(rng, 200, 4)}
    run = jax.jit(
        lambda p, rounds: jc.prune.synflow(mlp, p, 0.9995, jnp.zeros((1, 4)), rounds=rounds), static_argnums=1
    )

    def flow(rounds):
        masks = run(params, rounds)
        return float(mlp({k: jnp.abs(w) * masks[k] for k, w in params.items()}, jnp.ones((1, 4))).sum())

    assert flow(1) == 0
    assert flow(100) > 0


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_synflow_stays_inside_the_range_of_floats(scale, rng):
    """Four layers of this scale have a flow of 1e60 or 1e-60; the masks must be those of scale one."""

    def deep(params, x):
        for name in "abcd":
            x = jax.nn.relu(x @ params[name])
        return x

    params = {name: normal(rng, 6, 6) for name in "abcd"}
    scaled = {name: jnp.float32(2.0 ** round(np.log2(scale))) * w for name, w in params.items()}
    one, other = (jc.prune.synflow(deep, p, 0.8, jnp.ones((1, 6)), rounds=10) for p in (params, scaled))
    for name in params:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(("scale", "sparsity"), [(50.0, 0.5), (1e-3, 0.9)])
def test_synflow_of_a_deep_network_equals_that_in_logarithms(scale, sparsity, rng):
    """24 layers, flows of 2**210 and 2**-200 that no scale of the inputs would bring into float32 both ways."""
    stack = normal(rng, 24, 8, 8) * scale

    def deep(params, x):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["w"])[0]

    def tall(params, x):
        for w in params.values():
            x = jax.nn.relu(x @ w)
        return x

    layers = {f"{i:02d}": w for i, w in enumerate(stack)}
    masks = jc.prune.synflow(tall, layers, sparsity, jnp.ones((1, 8)), rounds=5)
    weights, total = np.abs(np.asarray(stack, np.float64)), stack.size
    kept = np.ones(weights.shape, bool)
    for k in range(1, 6):
        down, up = [np.ones(8)], [np.ones(8)]
        for w in weights * kept:
            down.append(down[-1] @ w / (down[-1] @ w).max())
        for w in (weights * kept)[::-1]:
            up.append(w @ up[-1] / (w @ up[-1]).max())
        flows = np.stack([d[:, None] * w * u for d, w, u in zip(down, weights * kept, up[-2::-1], strict=False)])
        flows = np.where(kept, flows / flows.sum((1, 2), keepdims=True), -1)
        left = max(round((1 - sparsity) ** (k / 5) * total), total - round(sparsity * total))
        kept = flows >= np.sort(flows, axis=None)[-left]
    np.testing.assert_array_equal(np.stack(list(masks.values())), kept)
    one = jc.prune.synflow(deep, {"w": stack}, sparsity, jnp.ones((1, 8)), rounds=5)["w"]
    np.testing.assert_array_equal(one, kept)


def test_synflow_of_residual_blocks_wants_wider_floats(rng):
    def residual(params, x):
        return jax.lax.scan(lambda x, w: (x + jax.nn.relu(x @ w), None), x, params["w"])[0]

    w = normal(rng, 40, 8, 8) * 60
    found = jc.prune.synflow(residual, {"w": w}, 0.5, jnp.ones((1, 8)), rounds=2)
    with jax.enable_x64():
        wide = jnp.asarray(np.asarray(w), jnp.float64)
        masks = jc.prune.synflow(residual, {"w": wide}, 0.5, jnp.ones((1, 8)), rounds=2)
    assert int(masks["w"].sum()) == w.size // 2
    np.testing.assert_array_equal(found["w"], masks["w"])


def test_synflow_of_deep_networks_with_biases_is_that_of_layers_scaled_alike(rng):
    """A power of two on each layer, and all before it on its bias, scales all paths alike."""

    def deep(params, x):
        return jax.lax.scan(lambda x, p: (jax.nn.relu(x @ p["w"] + p["b"]), None), x, params)[0]

    params = {"w": normal(rng, 24, 8, 8) * 2000, "b": normal(rng, 24, 8)}
    powers = 2.0 ** (-13 * np.arange(1, 25))
    near = {"w": params["w"] * 2.0**-13, "b": jnp.asarray(np.asarray(params["b"], np.float64) * powers[:, None])}
    near["b"] = near["b"].astype(jnp.float32)
    found, wanted = (jc.prune.synflow(deep, p, 0.8, jnp.ones((1, 8)), rounds=5, match="w")["w"] for p in (params, near))
    np.testing.assert_array_equal(found, wanted)
    assert int(found.sum()) == round(0.2 * found.size) and int(found.sum((1, 2)).min()) > 0
    far, one = (jc.prune.synflow_scores(deep, p, jnp.ones((1, 8)))["w"] for p in (params, near))
    assert bool(jnp.isfinite(far).all())
    np.testing.assert_allclose(far / far.max(), one / one.max(), rtol=1e-4, atol=1e-7)


def test_synflow_refuses_what_it_cannot_do(rng):
    params = small_mlp(rng)
    with pytest.raises(ValueError, match="rounds=0 must be positive"):
        jc.prune.synflow(mlp, params, 0.5, jnp.ones((1, 5)), rounds=0)
    with pytest.raises(ValueError, match=r"synflow: sparsity=1.5 is outside \[0, 1\]"):
        jc.prune.synflow(mlp, params, 1.5, jnp.ones((1, 5)))
    with pytest.raises(ValueError, match="match='z' finds no float leaf"):
        jc.prune.synflow(mlp, params, 0.5, jnp.ones((1, 5)), match="z")
    with pytest.raises(ValueError, match="not finite at any scale"):
        jc.prune.synflow(lambda p, x: mlp(p, x) / 0.0, params, 0.5, jnp.ones((1, 5)), rounds=2)
    only = jc.prune.synflow(mlp, params, 0.5, jnp.ones((1, 5)), rounds=3, match="[ab]")
    assert sorted(only) == ["a", "b"] and sum(int(m.sum()) for m in only.values()) == 77 - round(0.5 * 77)
