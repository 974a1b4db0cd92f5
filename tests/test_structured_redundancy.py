"""Units that resemble others, and importance that is carried back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import jcompress as jc
from jcompress.prune import structured


def random_params(rng, shapes):
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def mlp(p, x):
    return jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def cnn(p, x):
    x = jax.nn.relu(convolve(x, p["one"]) * p["scale"] + p["bias"])
    x = jax.nn.relu(convolve(x, p["two"]))
    return x.reshape(x.shape[0], -1) @ p["out"]


MLP = {"a": (5, 6), "bias": (6,), "b": (6, 3)}
CNN = {"one": (3, 3, 2, 5), "scale": (5,), "bias": (5,), "two": (3, 3, 5, 4), "out": (36, 2)}


def hidden_of(groups, path):
    return next(name for name, g in groups.items() if any(p == path and g.prunable for p, _ in g.producers))


def assert_same(fn, old, new, groups, keep, x):
    y = fn(old, x)
    cut = fn(jc.trace.mask(new, groups, keep), x)
    np.testing.assert_allclose(cut, y, atol=2e-6 * float(jnp.abs(y).max()))


# The geometric median.


def test_distances_equal_those_of_scipy(rng):
    params = random_params(rng, CNN)
    groups = jc.trace.coupling(cnn, params, jnp.ones((2, 3, 3, 2)))
    for path in ("one", "two"):
        filters = np.asarray(params[path]).reshape(-1, params[path].shape[-1]).T
        found = structured.geometric_median(params, groups)[hidden_of(groups, path)]
        np.testing.assert_allclose(found, cdist(filters, filters).sum(1), rtol=1e-5)


def test_the_filter_at_the_geometric_median_goes_first_whatever_its_norm(rng):
    ring = np.stack([[np.cos(t), np.sin(t)] for t in np.arange(6) / 6 * 2 * np.pi]) + 10
    params = {"w": jnp.asarray(np.concatenate([ring, [[10.0, 10.0]]]).T, jnp.float32)}
    groups = {"g": jc.trace.Group(size=7, producers=(("w", 1),))}
    assert int(jnp.argmin(structured.geometric_median(params, groups)["g"])) == 6
    assert int(jnp.argmin(structured.l2(params, groups)["g"])) != 6


# Merging.


@pytest.mark.parametrize("jitted", [False, True])
def test_identical_neurons_merge_exactly_and_no_data_is_needed(rng, jitted):
    params = random_params(rng, MLP)
    for name in ("a", "bias"):
        params[name] = params[name].at[..., 4].set(params[name][..., 1]).at[..., 5].set(params[name][..., 1])
    x = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    groups = jc.trace.coupling(mlp, params, x)
    merge = jax.jit(lambda p, s: jc.rewrite.merge_neurons(p, groups, s)) if jitted else jc.rewrite.merge_neurons
    keep, new = merge(params, 1 / 3) if jitted else merge(params, groups, 1 / 3)
    (kept,) = keep.values()
    assert int(kept[jnp.array([1, 4, 5])].sum()) == 1
    assert int(kept.sum()) == 4
    assert_same(mlp, params, new, groups, keep, x)
    (survivor,) = (i for i in (1, 4, 5) if kept[i])
    np.testing.assert_allclose(new["b"][survivor], params["b"][jnp.array([1, 4, 5])].sum(0), rtol=1e-6)


def test_identical_filters_merge_through_convolutions_and_flattening(rng):
    params = random_params(rng, CNN)
    for name in ("one", "scale", "bias"):
        params[name] = params[name].at[..., 3].set(params[name][..., 0])
    params["two"] = params["two"].at[..., 2].set(params["two"][..., 1])
    x = jnp.asarray(rng.normal(size=(4, 3, 3, 2)), jnp.float32)
    groups = jc.trace.coupling(cnn, params, x)
    fractions = {hidden_of(groups, "one"): 0.2, hidden_of(groups, "two"): 0.25}
    keep, new = jc.rewrite.merge_neurons(params, groups, fractions)
    cut = {name: np.flatnonzero(~np.asarray(k)).tolist() for name, k in keep.items()}
    assert cut[hidden_of(groups, "one")] in ([0], [3])
    assert cut[hidden_of(groups, "two")] in ([1], [2])
    assert_same(cnn, params, new, groups, keep, x)


def test_neurons_that_differ_in_bias_alone_are_not_identical(rng):
    params = random_params(rng, MLP)
    params["a"] = params["a"].at[:, 4].set(params["a"][:, 1]).at[:, 3].set(params["a"][:, 2] + 1e-3)
    params["bias"] = params["bias"].at[1].set(5.0).at[4].set(-5.0).at[3].set(params["bias"][2])
    groups = jc.trace.coupling(mlp, params, jnp.ones((2, 5)))
    (kept,) = jc.rewrite.merge_neurons(params, groups, 1 / 6)[0].values()
    assert int(kept[jnp.array([2, 3])].sum()) == 1


def test_merging_follows_the_least_saliency_of_a_loop(rng):
    params = random_params(rng, MLP)
    groups = jc.trace.coupling(mlp, params, jnp.ones((2, 5)))
    w = np.concatenate([params["a"], params["bias"][None]]).T.astype(np.float64)
    a, alive = np.asarray(params["b"], np.float64).copy(), list(range(6))
    for _ in range(4):
        i, j = min(
            itertools.permutations(alive, 2), key=lambda ij: np.mean(a[ij[1]] ** 2) * np.sum((w[ij[0]] - w[ij[1]]) ** 2)
        )
        a[i], a[j] = a[i] + a[j], 0
        alive.remove(j)
    keep, new = jc.rewrite.merge_neurons(params, groups, 4 / 6)
    assert np.flatnonzero(*keep.values()).tolist() == alive
    np.testing.assert_allclose(new["b"], a, rtol=1e-5, atol=1e-5)


def test_one_neuron_always_stays(rng):
    params = random_params(rng, MLP)
    groups = jc.trace.coupling(mlp, params, jnp.ones((2, 5)))
    (kept,) = jc.rewrite.merge_neurons(params, groups, 1.0)[0].values()
    assert int(kept.sum()) == 1


def test_what_cannot_merge_is_explained(rng):
    params = random_params(rng, MLP)
    groups = {"g": jc.trace.Group(size=6, producers=(("a", 1),))}
    with pytest.raises(ValueError, match=r"g: none of its 1 members .* members='consumers'"):
        jc.rewrite.merge_neurons(params, groups, 0.5)
    with pytest.raises(ValueError, match=r"g: merge_neurons: sparsity=2 is outside"):
        jc.rewrite.merge_neurons(params, groups, 2)
    with pytest.raises(ValueError, match=r"x: there is no such group"):
        jc.rewrite.merge_neurons(params, groups, {"x": 0.5})


# NISP.


def test_in_a_linear_network_importance_is_the_sum_over_paths(rng):
    params = random_params(rng, {"a": (2, 3), "b": (3, 4), "c": (4, 2)})
    groups = jc.trace.coupling(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], params, jnp.ones((5, 2)))
    final = jnp.array([1.0, 3.0])
    found = structured.nisp(params, groups, ["a", "b", "c"], final)
    b, c = (np.abs(np.asarray(params[name], np.float64)) for name in "bc")
    paths = [sum(b[i, j] * c[j, k] * float(final[k]) for j in range(4) for k in range(2)) for i in range(3)]
    np.testing.assert_allclose(found[hidden_of(groups, "a")], paths, rtol=1e-5)
    np.testing.assert_allclose(found[hidden_of(groups, "b")], c @ np.asarray(final), rtol=1e-5)


def test_importance_adds_up_over_branches(rng):
    def fn(p, x):
        h = x @ p["a"]
        return h @ p["b"] + (h @ p["c"]) @ p["d"]

    params = random_params(rng, {"a": (2, 3), "b": (3, 2), "c": (3, 4), "d": (4, 2)})
    groups = jc.trace.coupling(fn, params, jnp.ones((5, 2)))
    found = structured.nisp(params, groups, ["a", "b", "c", "d"], {"b": jnp.ones(2), "d": jnp.ones(2)})
    b, c, d = (np.abs(np.asarray(params[name])) for name in "bcd")
    np.testing.assert_allclose(found[hidden_of(groups, "a")], (b + c @ d).sum(1), rtol=1e-5)


def test_convolutions_and_flattening_pass_importance_on(rng):
    """With positive weights and ones for gradients it is the gradient by the unit's output, summed over positions."""
    params = random_params(rng, CNN)
    groups = jc.trace.coupling(cnn, params, jnp.ones((2, 3, 3, 2)))
    found = structured.nisp(params, groups, ["one", "two", "out"], jnp.ones(2))
    out = np.abs(np.asarray(params["out"])).sum(1).reshape(9, 4).sum(0)
    np.testing.assert_allclose(found[hidden_of(groups, "two")], out, rtol=1e-5)
    two = np.abs(np.asarray(params["two"])).sum((0, 1)) @ out
    np.testing.assert_allclose(found[hidden_of(groups, "one")], two, rtol=1e-5)


def test_a_chain_out_of_order_is_explained(rng):
    params = random_params(rng, {"a": (2, 3), "b": (3, 4)})
    groups = jc.trace.coupling(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((5, 2)))
    with pytest.raises(ValueError, match=r"b: nothing later in the chain reads what it puts out"):
        structured.nisp(params, groups, ["b", "a"], jnp.ones(3))
