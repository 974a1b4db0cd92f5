"""Optimal brain surgery and SparseGPT against brute force, against simpler masks, and on whole models."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_conformance import collectives

import jcompress as jc
from jcompress.prune import NM, OBS, Magnitude, SparseGPT, Wanda
from jcompress.prune.masks import obs


def correlated(rng, k, n=None):
    """Inputs whose features are mixed."""
    mix = rng.normal(size=(k, k)) / k**0.5 + 0.5 * np.eye(k)
    return (rng.normal(size=(n or 4 * k, k)) @ mix).astype(np.float32)


def context(x, path="array"):
    gram = jnp.asarray(x.T.astype(np.float64) @ x, jnp.float32)
    square = jnp.asarray((x.astype(np.float64) ** 2).sum(0), jnp.float32)
    return jc.Context(stats=jc.trace.Stats(gram=gram, square=square, axes=(-2,)), path=path)


def moved(node, w, x):
    """How far the outputs moved, in squares."""
    return float(((x.astype(np.float64) @ (np.asarray(node.materialize(), np.float64) - np.asarray(w))) ** 2).sum())


def least_squares(w, hessian, kept):
    """The minimum of dw^T H dw over weights that are zero off the kept set, and where it is."""
    cut = np.setdiff1d(np.arange(len(w)), kept)
    best = np.zeros_like(w)
    best[kept] = w[kept] + np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[np.ix_(kept, cut)] @ w[cut])
    return best


def test_saliency_and_step_are_the_constrained_minimum_and_no_more_than_damage(rng):
    x, w = correlated(rng, 6), rng.normal(size=6)
    hessian = x.T.astype(np.float64) @ x
    inverse = np.linalg.inv(hessian)
    saliency = np.asarray(jc.prune.obs_saliency(jnp.asarray(w, jnp.float32), jnp.asarray(inverse, jnp.float32)))
    assert (saliency <= 0.5 * np.diag(hessian) * w**2 * (1 + 1e-5)).all()
    for q in range(6):
        best = least_squares(w, hessian, np.delete(np.arange(6), q))
        step = jc.prune.obs_step(jnp.asarray(w, jnp.float32), jnp.asarray(inverse, jnp.float32), q)
        np.testing.assert_allclose(w + np.asarray(step), best, atol=1e-4)
        np.testing.assert_allclose(saliency[q], 0.5 * (best - w) @ hessian @ (best - w), rtol=1e-4)


@pytest.mark.parametrize("n", [10, 50, 1000])
def test_the_recursion_keeps_its_digits_down_to_the_smallest_damping(n, rng):
    x = rng.normal(size=(n, 20)).astype(np.float32)
    for damping, bound in ((1e-8, 1e-3), (1e-6, 1e-4), (1e-4, 1e-5)):
        want = np.linalg.inv(damping * np.eye(20) + x.T.astype(np.float64) @ x / n)
        error = np.linalg.norm(np.asarray(jc.prune.inverse_hessian(jnp.asarray(x), damping)) - want)
        assert error < bound * np.linalg.norm(want)


def test_the_recursion_and_the_factor_give_the_inverse(rng):
    x = rng.normal(size=(40, 6)).astype(np.float32)
    want = np.linalg.inv(0.1 * np.eye(6) + x.T.astype(np.float64) @ x / 40)
    np.testing.assert_allclose(jc.prune.inverse_hessian(jnp.asarray(x), damping=0.1), want, rtol=1e-3, atol=1e-4)
    hessian = jnp.asarray(np.linalg.inv(want), jnp.float32)
    factor = obs.inverse_factor(hessian)
    np.testing.assert_allclose(factor.T @ factor, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(factor, jnp.triu(factor))


def test_obs_removes_greedily_and_what_stays_is_the_least_squares_fit(rng):
    x, w = correlated(rng, 8), rng.normal(size=(8, 3)).astype(np.float32)
    hessian = x.T.astype(np.float64) @ x
    node = OBS(0.5, damping=0.0)(jnp.asarray(w), context(x))
    for j in range(3):
        kept = np.arange(8)
        for _ in range(4):
            errors = []
            for q in kept:
                best = least_squares(w[:, j], hessian, np.setdiff1d(kept, [q]))
                errors.append((best - w[:, j]) @ hessian @ (best - w[:, j]))
            kept = np.delete(kept, np.argmin(errors))
        np.testing.assert_array_equal(np.flatnonzero(node.mask[:, j]), kept)
        np.testing.assert_allclose(node.materialize()[:, j], least_squares(w[:, j], hessian, kept), atol=2e-4)


def test_obs_follows_n_of_m(rng):
    x, w = correlated(rng, 12), jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)
    node = OBS(pattern=NM(2, 4))(w, context(x))
    assert (np.asarray(node.mask).reshape(3, 4, 4).sum(1) == 2).all()
    assert moved(node, w, x) < moved(Magnitude(pattern=NM(2, 4))(w), w, x)
    assert moved(OBS(0.5)(w, context(x)), w, x) < moved(node, w, x)


def paper_sweep(w, hessian, sparsity, block, pattern=None):
    """The published algorithm in float64: columns in turn, masks block by block or group by group."""
    w, inverse = w.astype(np.float64).copy(), np.linalg.inv(hessian)
    factor, mask = np.linalg.cholesky(inverse).T, np.ones(w.shape, bool)
    k, n = w.shape
    for j in range(k):
        width = block if pattern is None else pattern.m
        if j % width == 0:
            rows = slice(j, min(j + width, k))
            saliency = w[rows] ** 2 / np.diag(factor)[rows, None] ** 2
            if pattern is None:
                size = saliency.size
                keep = (rows.stop * n - round(sparsity * rows.stop * n)) - (j * n - round(sparsity * j * n))
                chosen = np.zeros(size, bool)
                chosen[np.argsort(-saliency.ravel(), kind="stable")[:keep]] = True
                mask[rows] = chosen.reshape(saliency.shape)
            else:
                mask[rows] = np.argsort(np.argsort(-saliency, axis=0), axis=0) < pattern.n
        value = np.where(mask[j], w[j], 0)
        w[j + 1 :] -= np.outer(factor[j, j + 1 :], (w[j] - value) / factor[j, j])
        w[j] = value
    return w, mask


@pytest.mark.parametrize(
    ("k", "block", "pattern"),
    [
        (48, 16, None),
        (40, 16, None),
        (20, 128, None),
        (36, 12, None),
        (48, 16, NM(2, 4)),
        (40, 24, NM(1, 8)),
        (36, 18, NM(2, 3)),
    ],
)
def test_the_blocked_sweep_is_the_published_one(k, block, pattern, rng):
    x, w = correlated(rng, k), rng.normal(size=(k, 7)).astype(np.float32)
    sparsity = 0.6 if pattern is None else None
    node = SparseGPT(sparsity, pattern, block_size=block, damping=0.02)(jnp.asarray(w), context(x))
    gram = x.T.astype(np.float64) @ x
    want, mask = paper_sweep(w, gram + 0.02 * np.diag(gram).mean() * np.eye(k), sparsity, block, pattern)
    np.testing.assert_array_equal(node.mask, mask)
    np.testing.assert_allclose(node.materialize(), want, atol=2e-3)
    if pattern is None:
        assert int((~node.mask).sum()) == round(0.6 * w.size)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_outputs_move_less_than_with_the_masks_of_magnitude_and_wanda(pattern, rng):
    x = (rng.normal(size=(400, 16)) @ rng.normal(size=(16, 64)) / 4 + 0.5 * rng.normal(size=(400, 64))).astype(
        np.float32
    )
    w = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    sparsity = 0.5 if pattern is None else None
    errors = {m: moved(m(sparsity, pattern=pattern)(w, context(x)), w, x) for m in (SparseGPT, Wanda, Magnitude)}
    assert errors[SparseGPT] < 0.7 * errors[Wanda]
    assert errors[SparseGPT] < 0.7 * errors[Magnitude]
    if pattern is not None:
        assert moved(OBS(pattern=pattern)(w, context(x)), w, x) < errors[SparseGPT]


def test_with_the_identity_it_is_magnitude(rng):
    w = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
    stats = jc.trace.Stats(gram=jnp.eye(32), axes=(-2,))
    for pattern, sparsity in ((None, 0.7), (NM(2, 4), None)):
        node = SparseGPT(sparsity, pattern)(w, jc.Context(stats=stats))
        want = Magnitude(sparsity, pattern=pattern)(w)
        np.testing.assert_array_equal(node.mask, want.mask)
        np.testing.assert_allclose(node.materialize(), want.materialize(), atol=1e-6)


@pytest.mark.parametrize(("group_size", "pattern"), [(None, None), (8, NM(2, 4))])
def test_a_quantizer_in_the_sweep_gives_codes_of_what_stays_and_smaller_errors_than_after_it(group_size, pattern, rng):
    sparsity, grid = (0.5 if pattern is None else None), jc.quantize.Int(bits=3, group_size=group_size)
    together, after = 0.0, 0.0
    for _ in range(3):
        x, w = correlated(rng, 32, 300), jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
        joint = SparseGPT(sparsity, pattern, block_size=16, quantizer=grid)(w, context(x))
        assert joint.values.scale.shape == (32 // (group_size or 32), 8)
        assert int(joint.mask.sum()) == 128
        apart = jc.chain(SparseGPT(sparsity, pattern, block_size=16), grid)(w, context(x))
        assert jax.tree.structure(joint) == jax.tree.structure(apart)
        together, after = together + moved(joint, w, x), after + moved(apart, w, x)
    assert together < after


def test_a_quantizer_whose_groups_do_not_fit_the_blocks_or_the_pattern_is_refused(rng):
    x, w = correlated(rng, 24), jnp.asarray(rng.normal(size=(24, 4)), jnp.float32)
    for group_size, pattern in ((12, None), (6, NM(2, 4))):
        method = SparseGPT(0.5, pattern, block_size=16, quantizer=jc.quantize.Int(bits=4, group_size=group_size))
        with pytest.raises(ValueError, match=rf"array: SparseGPT.* needs a block_size .* groups of {group_size}"):
            method(w, context(x))
    with pytest.raises(ValueError, match=r"the grid Magnitude\(sparsity=0.5\) gives Masked\(.*expected Quantized"):
        SparseGPT(0.5, quantizer=Magnitude(0.5))(w, context(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_laid_out_as_their_statistics(groups, rng):
    dims = ("NHWC", "HWIO", "NHWC")

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "VALID", dimension_numbers=dims, feature_group_count=groups
        )

    params = {"w": jnp.asarray(rng.normal(size=(2, 2, 4 // groups, 6)), jnp.float32)}
    x = jnp.asarray(correlated(rng, 4, 8 * 36).reshape(8, 6, 6, 4))
    x = x + 0.7 * jnp.roll(x, 1, axis=1)
    errors = {}
    for method in (SparseGPT(0.5), OBS(0.5), Wanda(0.5), Magnitude(0.5)):
        plan = jc.plan(params, [("w", method)])
        stats = jc.calibrate(fn, params, [x], statistics=["gram", "norm"])
        small = jc.compress(params, plan, stats=stats)
        assert int(small["w"].mask.sum()) == params["w"].size // 2
        errors[type(method)] = float(((fn(jc.materialize(small), x) - fn(params, x)) ** 2).sum())
    assert errors[SparseGPT] < 0.9 * min(errors[Wanda], errors[Magnitude])
    assert errors[OBS] < 0.9 * errors[Wanda]


def test_a_scanned_stack_is_pruned_layer_by_layer(rng):
    def fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    params, x = {"w": jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32)}, jnp.asarray(correlated(rng, 8))
    stats = jc.calibrate(fn, params, [x], statistics=["gram"])
    for method in (SparseGPT(0.5), OBS(0.5)):
        whole = jc.compress(params, jc.plan(params, [("w", method)]), stats=stats)["w"]
        each = jc.compress(params, jc.plan(params, [("w", jc.stacked(method))]), stats=stats)["w"]
        np.testing.assert_array_equal(whole.mask, each.mask)
        np.testing.assert_allclose(whole.materialize(), each.materialize(), atol=1e-5)
        assert whole.mask.sum((1, 2)).tolist() == [32, 32, 32]


def test_sharded_outputs_move_scalars_only(rng):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    x, w = correlated(rng, 32), jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    known = context(x)
    placed = jax.device_put(w, NamedSharding(mesh, P(None, "model")))
    prune = jax.jit(lambda w: SparseGPT(0.5, block_size=16)(w, known))
    assert max(size for _, size in collectives(prune.lower(placed).compile().as_text())) <= 64
    np.testing.assert_array_equal(prune(placed).mask, SparseGPT(0.5, block_size=16)(w, known).mask)


def test_a_traced_sparsity_under_vmap_is_exact(rng):
    x, w = correlated(rng, 24), jnp.asarray(rng.normal(size=(24, 5)), jnp.float32)
    known = context(x)
    for method in (SparseGPT, OBS):
        counts = jax.jit(jax.vmap(lambda s, m=method: m(s)(w, known).mask.sum()))
        assert counts(jnp.array([0.0, 0.25, 0.5, 1.0])).tolist() == [120, 90, 60, 0]


def test_the_weights_behind_a_mask_count_as_zeros(rng):
    x, w = correlated(rng, 16), jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    where = jnp.asarray(rng.uniform(size=(16, 4)) < 0.6).at[:4].set(True)
    for method in (SparseGPT(0.5), OBS(0.6)):
        known = context(x)
        node = method(w, jc.Context(stats=known.stats, where=where))
        zeroed = method(jnp.where(where, w, 0), jc.Context(stats=known.stats, where=where))
        np.testing.assert_array_equal(node.mask, zeroed.mask)
        np.testing.assert_allclose(node.materialize(), zeroed.materialize(), atol=1e-6)


@pytest.mark.parametrize("method", [SparseGPT, OBS])
def test_errors_name_the_parameter(method, rng):
    params = {"w": jnp.ones((6, 4))}
    name = method.__name__
    with pytest.raises(ValueError, match=rf"w: {name} needs 'stats.gram', which is missing; pass stats=jc.calibrate"):
        jc.compress(params, jc.plan(params, [("w", method(0.5))]))
    with pytest.raises(ValueError, match="w: found 'gram' of shape"):
        method(0.5)(params["w"], context(correlated(rng, 5), "w"))
    with pytest.raises(ValueError, match=r"w: NM\(n=2, m=4\) needs axis -2 in groups of 4"):
        layout = jc.trace.layout(lambda p, x: x @ p["w"], params, jnp.ones((1, 6)))  # which statistics would tell too
        jc.plan(params, [("w", method(pattern=NM(2, 4)))], layout=layout)
    with pytest.raises(ValueError, match=r"w: NM\(n=2, m=4\) needs groups of 4, found 6 contracted inputs"):
        method(pattern=NM(2, 4))(params["w"], context(correlated(rng, 6), "w"))
    with pytest.raises(ValueError, match="expected NM"):
        method(0.5, pattern=jc.prune.Block((2, 2)))
    with pytest.raises(ValueError, match=r"sparsity=1.5 is outside \[0, 1\]"):
        method(1.5)
    with pytest.raises(ValueError, match="block_size=6 must be positive and a multiple of 4"):
        SparseGPT(pattern=NM(2, 4), block_size=6)


def test_brute_force_over_all_masks_bounds_the_sweep(rng):
    """For one output the best of all masks is a floor; surgery comes near it, magnitude does not."""
    x, ratios = correlated(rng, 8), {OBS: [], SparseGPT: [], Magnitude: []}
    hessian = x.T.astype(np.float64) @ x
    for _ in range(5):
        w = rng.normal(size=(8, 1)).astype(np.float32)
        fits = [least_squares(w[:, 0], hessian, np.array(kept)) for kept in itertools.combinations(range(8), 4)]
        floor = min((f - w[:, 0]) @ hessian @ (f - w[:, 0]) for f in fits)
        for method, found in ratios.items():
            options = {} if method is Magnitude else {"damping": 0.0}
            found.append(moved(method(0.5, **options)(jnp.asarray(w), context(x)), w, x) / floor)
    assert min(min(found) for found in ratios.values()) > 0.999
    assert np.mean(ratios[OBS]) < np.mean(ratios[SparseGPT]) < np.mean(ratios[Magnitude])
