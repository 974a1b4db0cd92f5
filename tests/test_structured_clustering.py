"""P-pruning: planted duplicates of neurons and heads collapse without a trace."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.rewrite import clusters


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    return jnp.einsum("bthe,hed->btd", jnp.einsum("bhts,bshe->bthe", weights, v), p["o"]) + p["bias"]


def mlp(p, x):
    return jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]


def random_params(rng, **shapes):
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def read(fn, params, x):
    return jc.trace.coupling(fn, params, x), jc.calibrate(fn, params, [(x,)], progress=False)


def test_duplicated_heads_collapse_and_the_sum_is_exact(rng):
    params = random_params(rng, q=(6, 5, 3), k=(6, 5, 3), v=(6, 5, 3), o=(5, 3, 6), bias=(6,))
    copies = np.array([0, 1, 0, 1, 4])
    params |= {n: params[n][:, copies] for n in "qkv"}
    x = jnp.asarray(rng.normal(size=(2, 7, 6)), jnp.float32)
    groups, stats = read(attention, params, x)
    heads = next(name for name, group in groups.items() if ("o", 0) in group.members)
    keep, new = jc.rewrite.p_pruning(params, groups, stats, {heads: 0.4})
    kept = np.flatnonzero(keep[heads])
    assert sorted(copies[kept]) == [0, 1, 4]
    y = jax.random.normal(jax.random.key(1), (3, 4, 6))
    np.testing.assert_allclose(attention(jc.trace.mask(new, groups, keep), y), attention(params, y), atol=2e-5)
    small_fn, small = jc.shrink(attention, new, keep, x)
    assert small["q"].shape == (6, 3, 3)
    np.testing.assert_allclose(small_fn(small, y), attention(params, y), atol=2e-5)


def test_duplicated_neurons_collapse_under_jit_with_a_traced_sparsity(rng):
    params = random_params(rng, up=(4, 8), bias=(8,), down=(8, 3))
    copies = np.array([0, 1, 2, 0, 1, 2, 6, 6])
    params |= {"up": params["up"][:, copies], "bias": params["bias"][copies]}
    x = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
    groups, stats = read(mlp, params, x)
    prune = jax.jit(lambda p, s, fraction: jc.rewrite.p_pruning(p, groups, s, fraction))
    keep, new = prune(params, stats, 0.5)
    assert sorted(copies[np.flatnonzero(keep["up[1]"])]) == [0, 1, 2, 6]
    np.testing.assert_allclose(mlp(jc.trace.mask(new, groups, keep), x), mlp(params, x), atol=1e-5)
    assert not np.allclose(mlp(jc.trace.mask(params, groups, keep), x), mlp(params, x), atol=1e-2)


def test_distances_are_those_of_the_outputs(rng):
    params = random_params(rng, up=(4, 6), bias=(6,), down=(6, 3))
    x = jnp.asarray(rng.normal(size=(15, 4)), jnp.float32)
    groups, stats = read(mlp, params, x)
    products = clusters._output_products("up[1]", groups["up[1]"], params, stats)
    hidden = np.asarray(jax.nn.gelu(x @ params["up"] + params["bias"]), np.float64)
    np.testing.assert_allclose(products, hidden.T @ hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_well_separated_clusters_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    points = np.repeat([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], [3, 3, 3], axis=0) + 0.3 * rng.normal(size=(9, 2))
    points = points[rng.permutation(9)]
    apart = np.square(points[:, None] - points).sum(-1)
    center = np.asarray(clusters._centers(jnp.asarray(apart), jnp.int32(3), jnp.int32(0)))
    best = min(itertools.combinations(range(9), 3), key=lambda c: apart[:, c].min(axis=1).sum())
    assert set(center) == set(best)
    np.testing.assert_array_equal(center, np.asarray(best)[apart[:, best].argmin(axis=1)])


def test_the_most_salient_of_each_cluster_stays(rng):
    params = random_params(rng, up=(4, 4), bias=(4,), down=(4, 3))
    params |= {"up": params["up"][:, [0, 1, 0, 1]], "bias": params["bias"][jnp.array([0, 1, 0, 1])]}
    x = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
    groups, stats = read(mlp, params, x)
    for scores, expected in (([1, 2, 3, 4], [2, 3]), ([5, 2, 3, 4], [0, 3]), ([5, 6, 3, 4], [0, 1])):
        keep, new = jc.rewrite.p_pruning(params, groups, stats, 0.5, {"up[1]": jnp.asarray(scores)})
        assert np.flatnonzero(keep["up[1]"]).tolist() == expected
        np.testing.assert_allclose(mlp(jc.trace.mask(new, groups, keep), x), mlp(params, x), atol=1e-5)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 6), (0.5, 3), (1.0, 1)])
def test_counts_are_exact_even_when_all_outputs_are_equal(sparsity, kept):
    params = {"up": jnp.ones((2, 6)), "bias": jnp.zeros(6), "down": jnp.arange(6.0)[:, None]}
    x = jnp.ones((3, 2))
    groups, stats = read(mlp, params, x)
    keep, new = jc.rewrite.p_pruning(params, groups, stats, sparsity)
    assert int(keep["up[1]"].sum()) == kept
    np.testing.assert_allclose(new["down"].sum(), 15.0)
    np.testing.assert_array_equal(new["down"][~keep["up[1]"]], 0)


def test_without_absorbing_the_weights_stay(rng):
    params = random_params(rng, up=(4, 6), bias=(6,), down=(6, 3))
    x = jnp.asarray(rng.normal(size=(15, 4)), jnp.float32)
    groups, stats = read(mlp, params, x)
    _, new = jc.rewrite.p_pruning(params, groups, stats, 0.5, absorb=False)
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_errors_name_what_is_wrong(rng):
    params = random_params(rng, up=(4, 6), down=(6, 4))
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def tied(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["up"].T @ p["down"][:4]

    groups, stats = read(tied, params, x)
    with pytest.raises(ValueError, match="tied"):
        jc.rewrite.p_pruning(params, groups, stats, {"up[1]": 0.5})
    with pytest.raises(ValueError, match=r"up\[1\].*1.5"):
        jc.rewrite.p_pruning(params, groups, stats, {"up[1]": 1.5})
    with pytest.raises(ValueError, match="needs 'gram'"):
        jc.rewrite.p_pruning(params, groups, {}, {"up[1]": 0.5})
