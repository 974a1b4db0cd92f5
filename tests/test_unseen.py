"""Too little calibration: singular Gram matrices, and inputs, experts and weights that no data reached."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.numeric import damping

Q, P = jc.quantize, jc.prune


def few(rng, k):
    return rng.normal(size=(8, k))


def alike(rng, k):
    return rng.normal(size=(1, k)) * 100 + rng.normal(size=(64, k)) * 0.01


def copies(rng, k):
    return np.repeat(rng.normal(size=(64, 1)), k, 1)


def partly_dead(rng, k):
    x = rng.normal(size=(6, k))
    x[:, ::3] = 0
    return x


def tiny(rng, k):
    return 1e-15 * rng.normal(size=(8, k))


def huge(rng, k):
    return 1e15 * rng.normal(size=(8, k))


def statistics(x):
    x = np.asarray(x, np.float32)
    known = {"gram": x.swapaxes(-1, -2) @ x, "square": (x**2).sum(-2)}
    return jc.trace.Stats(**jax.tree.map(jnp.asarray, known), axes=(-2,))


def compressed(method, w, x, jit=False):
    params, stats = {"a": {"w": jnp.asarray(w, jnp.float32)}}, {"a/w": statistics(x)}
    plan = jc.plan(params, [(".*", method)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jc.CalibrationWarning)
        run = jax.jit(lambda p, s: jc.compress(p, plan, stats=s)) if jit else lambda p, s: jc.compress(p, plan, stats=s)
        return run(params, stats)["a"]["w"]


@pytest.mark.parametrize("inputs", [few, alike, copies, partly_dead, tiny, huge])
def test_a_singular_gram_matrix_does_no_worse_than_the_weights_alone(inputs, rng):
    k, asked = 64, 1e-7
    x, w = inputs(rng, k).astype(np.float32), rng.normal(size=(k, 8)).astype(np.float32)

    def error(method, jit=False):
        found = np.asarray(compressed(method, w, x, jit).materialize(), np.float64)
        assert np.isfinite(found).all()
        return np.linalg.norm(x.astype(np.float64) @ (found - w))

    rounded, cut = error(Q.Int(4)), error(P.Magnitude(0.5))
    assert error(Q.GPTQ(4, damping=asked)) <= rounded
    assert error(Q.GPTQ(4, damping=asked, order=True), jit=True) <= rounded
    assert error(Q.LQER(4, damping=asked)) <= rounded
    assert error(P.SparseGPT(0.5, damping=asked), jit=True) <= cut
    assert error(P.OBS(0.5, damping=asked)) <= cut


def test_the_damping_that_was_used_is_told_and_suffices():
    x = few(np.random.default_rng(0), 64)
    params, stats = {"w": jnp.ones((64, 2))}, {"w": statistics(x)}
    for method, told in ((Q.GPTQ(4, damping=1e-9), "damping=1e-09"), (Q.AWQ(Q.GPTQ(4, damping=0.0)), "damping=0")):
        with pytest.warns(jc.CalibrationWarning, match=rf"^w: .*singular with {told}, and \S+ was used"):
            jc.compress(params, jc.plan(params, [("w", method)]), stats=stats)
    jc.compress(params, jc.plan(params, [("w", Q.GPTQ(4))]), stats=stats)  # a warning is an error here


def test_the_root_is_that_of_the_raised_matrix_and_nothing_is_added_without_need(rng):
    full = rng.normal(size=(100, 32)).astype(np.float32)
    for x, size in ((full, 1.0), (full, 1e34), (full, 1e-34), (full[:8], 1.0)):
        gram = (x.T @ x) * np.float32(size)
        root, raised = jax.jit(damping.cholesky)(jnp.asarray(gram))
        assert (float(raised) == 0) == (len(x) > 32)
        want = gram + float(raised) * np.trace(gram) / 32 * np.eye(32)
        root = np.asarray(root, np.float64)
        np.testing.assert_allclose(root @ root.T, want, atol=1e-5 * size * 100)
    root, raised = damping.cholesky(jnp.full((4, 4), jnp.nan))
    assert np.isinf(raised) and np.isfinite(root).all()


EXPERTS = [P.SparseGPT(0.5), P.SparseGPT(pattern=P.NM(2, 4)), P.OBS(0.5), P.Wanda(0.5), P.Wanda(0.5, scope="leaf")]


@pytest.mark.parametrize("method", EXPERTS, ids=repr)
def test_an_expert_that_no_token_reached_is_pruned_by_magnitude(method, rng):
    w, x = rng.normal(size=(3, 16, 8)), rng.normal(size=(3, 32, 16))
    x[1] = 0
    node = compressed(method, w, x)
    kept, size = np.asarray(node.mask)[1], np.abs(w[1])
    if getattr(method, "scope", "leaf") == "output" or method.pattern:
        assert kept.sum() == 64
    np.testing.assert_allclose(np.asarray(node.materialize())[1], np.where(kept, w[1], 0), rtol=1e-6)
    best = np.sort(size.ravel())[::-1][: kept.sum()].sum()
    assert size[kept].sum() > 0.93 * best


QUANTIZERS = [Q.GPTQ(4), Q.GPFQ(4), Q.AWQ(Q.Int(4)), Q.AdaRound(4, steps=20, clip="minmax")]


@pytest.mark.parametrize("method", QUANTIZERS, ids=repr)
def test_what_no_token_reached_is_rounded(method, rng):
    w, x = rng.normal(size=(3, 16, 8)), rng.normal(size=(3, 32, 16))
    x[1], x[0, :, 5] = 0, 0
    found = np.asarray(compressed(method, w, x).materialize())
    nearest = np.asarray(jc.stacked(Q.Int(4))(jnp.asarray(w, jnp.float32)).materialize())
    np.testing.assert_allclose(found[1], nearest[1], rtol=1e-5)
    if not isinstance(method, Q.AWQ):  # whose search gives all inputs other scales
        np.testing.assert_allclose(found[0, 5], nearest[0, 5], rtol=1e-5)


@pytest.mark.parametrize("method", [P.SparseGPT(0.5), P.OBS(0.5), P.Wanda(0.5)], ids=repr)
def test_an_input_that_was_never_seen_counts_as_the_mean_of_the_others(method, rng):
    w, x = rng.normal(size=(32, 8)), rng.normal(size=(300, 32))
    w[3] *= 10
    w[7] *= 0.01
    x[:, [3, 7]] = 0
    mask = np.asarray(compressed(method, w, x).mask)
    assert mask[3].mean() > 0.8 and not mask[7].any()


@pytest.mark.parametrize("method", [P.Fisher(0.5), P.OBD(0.5)], ids=repr)
def test_gradients_that_were_never_met_leave_the_choice_to_magnitude(method, rng):
    w, square = rng.normal(size=(2, 16, 8)), rng.uniform(0.5, 2, size=(2, 16, 8))
    square[1] = 0
    params, square = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(square, jnp.float32)
    layout = jc.Layout(batch=-3)
    stats = {"w": jc.trace.Stats(grad_square=square, hessian_diagonal=square, axes=(-2,))}
    plan = jc.plan(params, [("w", method)], layout={"w": layout})
    with pytest.warns(jc.CalibrationWarning, match=r"^w: calibration never saw 0.5 of the inputs, 1 of 2 layers"):
        kept = np.asarray(jc.compress(params, plan, stats=stats)["w"].mask)[1]
    assert np.abs(w[1])[kept].min() > np.abs(w[1])[~kept].max()
    assert 40 < kept.sum() < 88


def test_the_share_that_was_never_seen_is_told_once_a_leaf(rng):
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 2))}
    x = rng.normal(size=(9, 4))
    stats = {"b": statistics(x), "a": statistics(x * np.array([1, 0, 1, 1]))}
    with pytest.warns(jc.CalibrationWarning) as told:
        jc.compress(params, jc.plan(params, [(".*", P.Wanda(0.5))]), stats=stats)
    assert [str(one.message).partition(";")[0] for one in told] == ["a: calibration never saw 0.25 of the inputs"]


def test_one_warning_is_told_once_however_often_a_method_reads_it(rng):
    params, x = {"w": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)}, few(rng, 16)
    x[:, 3] = 0
    rough = Q.GPTQ(4, damping=1e-9)
    for method in (jc.residual(rough, rough), jc.residual(rough, P.SparseGPT(0.5, damping=1e-9), sweeps=2)):
        with pytest.warns(jc.CalibrationWarning) as told:
            jc.compress(params, jc.plan(params, [("w", method)]), stats={"w": statistics(x)})
        assert sorted(str(one.message)[:22] for one in told) == ["w: calibration never s", "w: its Gram matrix is "]


def test_statistics_that_are_not_finite_are_named():
    params = {"layer": {"w": jnp.ones((4, 2))}}
    stats = {"layer/w": jc.trace.Stats(gram=jnp.full((4, 4), jnp.inf), square=jnp.full(4, jnp.inf), axes=(-2,))}
    for method in (Q.GPTQ(4), P.Wanda(0.5)):
        with pytest.raises(ValueError, match=r"^layer/w: found 4 NaN or infinite entries in the statistic"):
            jc.compress(params, jc.plan(params, [(".*", method)]), stats=stats)


def test_a_method_that_gives_no_numbers_is_named():
    params = {"w": jnp.ones(3)}

    def broken(w, context=None):
        return jc.formats.Masked(w / 0, w > 0)

    with pytest.raises(ValueError, match=r"^w: .*gave NaN or infinite values"):
        jc.compress(params, jc.plan(params, [("w", broken)]))


ROWS = jax.sharding.PartitionSpec("rows")


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("at", [0, 7])
def test_also_in_one_entry_of_one_device(explicit, at):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    rows = jax.sharding.NamedSharding(jax.make_mesh((8,), ("rows",), axis_types=(kind,)), ROWS)
    params = {"fine": jnp.ones(3), "layer": {"w": jax.device_put(jnp.arange(32.0).reshape(8, 4) + 1, rows)}}

    def broken(w, context=None):
        first = jnp.arange(32).reshape(8, 4) == 4 * at
        return jc.formats.Sum((jc.formats.Masked(w, w > 0), jc.formats.Masked(jnp.where(first, jnp.nan, w), w > 0)))

    plan = jc.plan(params, [("layer/w", broken), ("fine", P.Magnitude(0.5))])
    with pytest.raises(ValueError, match=r"^layer/w: .*gave NaN or infinite values, from a leaf whose own are finite"):
        jc.compress(params, plan)
    w = np.array(params["layer"]["w"])
    w[at, 0] = np.nan
    params["layer"]["w"] = jax.device_put(w, rows)
    with pytest.raises(ValueError, match=r"^layer/w: found 1 NaN or infinite values"):
        jc.compress(params, plan)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("method", [Q.Float("float16"), Q.Float("bfloat16"), P.Magnitude(0.5)], ids=repr)
def test_results_of_any_float_are_looked_at_without_a_warning(method, dtype):
    params = {"w": jnp.arange(12.0).reshape(4, 3).astype(dtype)}
    assert jc.compress(params, jc.plan(params, [("w", method)]))["w"].dtype == jnp.dtype(dtype)


def test_factors_whose_product_is_no_number_are_named():
    params = {"w": jnp.ones((3, 3))}

    def overflowing(w, context=None):
        return jc.formats.LowRank(w[:, :1] * 1e30, w[:1] * 1e30)

    def divided(w, context=None):
        return dataclasses.replace(Q.Int(4)(w), codes=jnp.full((3, 3), 100, jnp.int8), scale=jnp.full((1, 3), 3e37))

    for method in (overflowing, divided):
        with pytest.raises(ValueError, match=r"^w: .*gave NaN or infinite values"):
            jc.compress(params, jc.plan(params, [("w", method)]))


@pytest.mark.parametrize("scale", [1.0, 1e25])
@pytest.mark.parametrize("seen", [True, False])
def test_channels_whose_readers_no_data_reached_go_by_their_weights(scale, seen):
    params = {"a": jnp.ones((1, 3)), "b": scale * jnp.array([[2.0], [-2.0], [1.0]])}
    hidden = {"hidden": jc.trace.Group(size=3, producers=(("a", 1),), consumers=(("b", 0),))}
    gram = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]]) * 1e20 * seen
    stats = {"b": jc.trace.Stats(gram=gram, axes=(0,))}
    order = P.structured.thinet(params, hidden, stats)["hidden"]
    entered = P.structured.lasso(params, hidden, stats)["hidden"]
    assert int(order.argmin()) == (0 if seen else 2)  # of those that cancel, or the smallest
    assert (int(entered.argmax()) == 2) == seen
    assert np.isfinite(entered).all()


def test_leaves_without_data_are_not_worthless_under_a_budget(rng):
    w = jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)
    stats = statistics(rng.normal(size=(2, 20, 8)) * np.array([1, 0])[:, None, None])
    error = jc.budget.output_error({"w": stats})
    assert float(error("w", w, w.at[1].set(0))) > 0.2 * float(error("w", w, w.at[0].set(0)))


def test_statistics_that_a_compiled_function_holds_are_not_looked_at(rng):
    params, stats = {"w": jnp.ones((4, 2))}, {"w": statistics(rng.normal(size=(9, 4)) * np.array([1, 0, 1, 1]))}
    plan = jc.plan(params, [("w", P.Wanda(0.5))])
    held = jax.jit(lambda x: x @ jc.materialize(jc.compress(params, plan, stats=stats))["w"])
    np.testing.assert_allclose(held(jnp.eye(4)).sum(0), 2)
