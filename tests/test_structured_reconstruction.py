"""Which inputs to keep, and new weights for those that read them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.prune import structured
from jcompress.trace import calibrate


def mlp(p, x):
    return jax.nn.relu(x @ p["up/kernel"] + p["up/bias"]) @ p["down/kernel"] + p["down/bias"]


def mlp_params(rng, inputs=6, hidden=10, outputs=4):
    shapes = {
        "up/kernel": (inputs, hidden), "up/bias": (hidden,), "down/kernel": (hidden, outputs), "down/bias": (outputs,)
    }  # fmt: skip
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def convolve(x, kernel, padding="VALID", stride=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dims)


def cnn(p, x):
    x = jax.nn.relu(convolve(x, p["one/kernel"]) + p["one/bias"])
    x = jax.nn.relu(convolve(x, p["two/kernel"]) + p["two/bias"])
    return x.reshape(x.shape[0], -1) @ p["out/kernel"]


def cnn_params(rng):
    shapes = {
        "one/kernel": (3, 3, 2, 6), "one/bias": (6,), "two/kernel": (3, 3, 6, 4), "two/bias": (4,),
        "out/kernel": (16, 3),
    }  # fmt: skip
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def known(fn, params, x):
    """The groups and the statistics of a function."""
    groups = jc.trace.coupling(fn, params, x)
    return groups, calibrate(fn, params, [x], statistics=("gram", "sum", "count", "zeros"))


def hidden_of(groups, path="up/kernel", axis=1):
    return next(name for name, group in groups.items() if (path, axis) in group.members)


def error(fn, old, new, groups, keep, x):
    """The relative error of outputs when ``new`` is cut."""
    y = fn(old, x)
    return float(jnp.linalg.norm(fn(jc.trace.mask(new, groups, keep), x) - y) / jnp.linalg.norm(y))


# Least squares.


def test_a_duplicated_channel_is_cut_without_loss(rng):
    params = mlp_params(rng)
    for name in ("up/kernel", "up/bias"):
        params[name] = params[name].at[..., 7].set(2 * params[name][..., 2])
    x = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    keep = {hidden_of(groups): jnp.arange(10) != 7}
    assert error(mlp, params, params, groups, keep, x) > 0.05
    assert error(mlp, params, jc.rewrite.reconstruct(params, groups, keep, stats), groups, keep, x) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_least_squares_equals_numpy_and_leaves_a_residual_orthogonal_to_what_stays(rng, scale):
    """Also where inputs are of very different size."""
    params = mlp_params(rng)
    params["up/kernel"] = params["up/kernel"].at[:, :5].multiply(scale)
    params["up/bias"] = params["up/bias"].at[:5].multiply(scale)
    params["down/kernel"] = params["down/kernel"].at[:5].divide(scale)
    x = jnp.asarray(rng.normal(size=(60, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    keep = {hidden_of(groups): jnp.asarray(rng.permutation(10) < 6)}
    new = jc.rewrite.reconstruct(params, groups, keep, stats)["down/kernel"]
    h = np.asarray(jax.nn.relu(x @ params["up/kernel"] + params["up/bias"]), np.float64)
    kept = np.asarray(keep[hidden_of(groups)])
    target = h @ np.asarray(params["down/kernel"], np.float64)
    expected = np.linalg.lstsq(h[:, kept], target, rcond=None)[0]
    np.testing.assert_allclose(new[kept], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert not np.any(new[~kept])
    residual = target - h @ np.asarray(new, np.float64)
    norms = np.linalg.norm(h[:, kept], axis=0)[:, None] * np.linalg.norm(target, axis=0)
    assert np.abs(h[:, kept].T @ residual / norms).max() < 1e-5


@pytest.mark.parametrize("path", ["one/kernel", "two/kernel"])
def test_convolutions_and_flattened_images_are_refitted(rng, path):
    """Duplicated filters, met by a convolution or, through a flatten, by a dense layer."""
    params = cnn_params(rng)
    for name in (path, path.replace("kernel", "bias")):
        params[name] = params[name].at[..., 3].set(params[name][..., 1])
    x = jnp.asarray(rng.normal(size=(40, 6, 6, 2)), jnp.float32)
    groups, stats = known(cnn, params, x)
    name = hidden_of(groups, path, 3)
    keep = {name: jnp.arange(groups[name].size) != 3}
    assert error(cnn, params, params, groups, keep, x) > 0.05
    assert error(cnn, params, jc.rewrite.reconstruct(params, groups, keep, stats), groups, keep, x) < 1e-4


def test_two_groups_read_by_one_kernel_are_refitted_together(rng):
    """Concatenation: the kernel's input axis is a part of each group."""

    def fn(p, x):
        return jnp.concatenate([jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"])], -1) @ p["c"]

    params = {"a": (5, 4), "b": (5, 6), "c": (10, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in params.items()}
    params["b"] = params["b"].at[:, 2].set(params["a"][:, 0])  # one cut unit is known to the other group
    params["a"] = params["a"].at[:, 3].set(params["a"][:, 1])
    x = jnp.asarray(rng.normal(size=(40, 5)), jnp.float32)
    groups, stats = known(fn, params, x)
    keep = {hidden_of(groups, "a"): jnp.arange(4) != 3, hidden_of(groups, "b"): jnp.arange(6) != 2}
    new = jc.rewrite.reconstruct(params, groups, keep, stats)
    assert error(fn, params, new, groups, keep, x) < 1e-5
    # Only one group is cut: what belongs to the other stays.
    new = jc.rewrite.reconstruct(params, groups, {hidden_of(groups, "a"): keep[hidden_of(groups, "a")]}, stats)
    assert not bool(jnp.any(jnp.all(new["c"][4:] == 0, axis=1)))


def test_scanned_layers_are_refitted_one_by_one(rng):
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["a"]) @ w["b"], None), x, p)[0]

    params = {"a": (3, 4, 8), "b": (3, 8, 4)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in params.items()}
    params["a"] = params["a"].at[:, :, 5].set(params["a"][:, :, 0])
    x = jnp.asarray(rng.normal(size=(40, 4)), jnp.float32)
    groups, stats = known(fn, params, x)
    assert stats["b"].gram.shape == (3, 8, 8)
    keep = {hidden_of(groups, "a", 2): jnp.arange(8) != 5}
    new = jc.rewrite.reconstruct(params, groups, keep, stats)
    assert error(fn, params, new, groups, keep, x) < 1e-4
    np.testing.assert_allclose(new["b"][:, 0], params["b"][:, 0] + params["b"][:, 5], rtol=1e-3, atol=1e-3)
    assert bool(structured.keep(structured.thinet(params, groups, stats), groups, 0.5)[hidden_of(groups, "a", 2)].any())


def test_grouped_convolutions_are_refitted_group_by_group(rng):
    def fn(p, x):
        x = jnp.tanh(convolve(x, p["one"]))
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["two"], (1, 1), "VALID", dimension_numbers=dims, feature_group_count=2
        ) + p["bias"]  # fmt: skip

    params = {"one": (3, 3, 2, 8), "two": (3, 3, 4, 6), "bias": (6,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in params.items()}
    # The units are the places inside a group; in both groups the last is a copy of another.
    params["one"] = params["one"].at[..., 3].set(params["one"][..., 1]).at[..., 7].set(-params["one"][..., 4])
    x = jnp.asarray(rng.normal(size=(20, 6, 6, 2)), jnp.float32)
    groups, stats = known(fn, params, x)
    name = next(name for name, group in groups.items() if ("two", 2) in group.consumers)
    keep = {name: jnp.arange(4) != 3}
    assert error(fn, params, params, groups, keep, x) > 0.05
    for biases in (False, True):
        new = jc.rewrite.reconstruct(params, groups, keep, stats, biases=biases)
        assert error(fn, params, new, groups, keep, x) < 1e-4
    assert structured.thinet(params, groups, stats)[name].shape == (4,)
    np.testing.assert_allclose(structured.apoz(params, groups, stats)[name], 1)


# LIAR.


def test_any_14_columns_of_rank_12_activations_lose_nothing(rng):
    """And plain pruning does."""
    basis = jnp.asarray(rng.normal(size=(12, 24)), jnp.float32)
    params = {"up": basis, "down": jnp.asarray(rng.normal(size=(24, 5)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(80, 12)), jnp.float32)

    def fn(p, x):
        return (x @ p["up"]) @ p["down"]

    groups, stats = known(fn, params, x)
    for seed in range(5):
        kept = np.random.default_rng(seed).permutation(24) < 14
        keep = {hidden_of(groups, "up"): jnp.asarray(kept)}
        assert error(fn, params, params, groups, keep, x) > 0.3
        assert error(fn, params, jc.rewrite.liar(params, groups, keep, stats, ridge=0.0), groups, keep, x) < 1e-4
        assert error(fn, params, jc.rewrite.liar(params, groups, keep, stats), groups, keep, x) < 3e-2


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1e-2, 1.0, 100.0])
def test_the_error_is_never_above_that_of_plain_pruning(rng, ridge):
    params = mlp_params(rng)
    x = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    for seed in range(10):
        keep = {hidden_of(groups): jnp.asarray(np.random.default_rng(seed).permutation(10) < 1 + seed)}
        plain = error(mlp, params, params, groups, keep, x)
        for new in (jc.rewrite.reconstruct(params, groups, keep, stats, ridge),
                    jc.rewrite.liar(params, groups, keep, stats, ridge)):  # fmt: skip
            assert error(mlp, params, new, groups, keep, x) <= plain * (1 + 1e-5) + 1e-6


def test_the_ridge_solution_is_the_closed_form(rng):
    params = mlp_params(rng)
    x = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    kept = rng.permutation(10) < 6
    keep = {hidden_of(groups): jnp.asarray(kept)}
    new = jc.rewrite.reconstruct(params, groups, keep, stats, ridge=0.1)["down/kernel"]
    h = np.asarray(jax.nn.relu(x @ params["up/kernel"] + params["up/bias"]), np.float64)
    gram, w = h.T @ h, np.asarray(params["down/kernel"], np.float64)
    inverse = np.linalg.inv(gram[kept][:, kept] + 0.1 * np.diag(np.diag(gram)[kept]))
    np.testing.assert_allclose(new[kept], w[kept] + inverse @ gram[kept][:, ~kept] @ w[~kept], rtol=1e-3, atol=1e-4)


def test_biases_take_the_mean_and_constants_cost_nothing(rng):
    params = mlp_params(rng)
    params["up/kernel"] = params["up/kernel"].at[:, 3].set(0)
    params["up/bias"] = params["up/bias"].at[3].set(5.0)
    x = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    keep = {hidden_of(groups): jnp.arange(10) != 3}
    assert error(mlp, params, jc.rewrite.liar(params, groups, keep, stats, ridge=0.0), groups, keep, x) < 1e-5
    keep = {hidden_of(groups): jnp.arange(10) < 5}
    new = jc.rewrite.liar(params, groups, keep, stats)
    cut = jc.trace.mask(new, groups, keep)
    np.testing.assert_allclose(mlp(cut, x).mean(0), mlp(params, x).mean(0), rtol=1e-4, atol=1e-4)


def test_reconstruction_runs_under_jit_and_shrinks(rng):
    params = mlp_params(rng)
    x = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    scores = structured.l1(params, groups)

    def cut(params, stats, s):
        keep = structured.keep(scores, groups, s)
        return keep, jc.rewrite.liar(params, groups, keep, stats)

    keep, new = jax.jit(cut)(params, stats, 0.5)
    for path, value in cut(params, stats, 0.5)[1].items():
        np.testing.assert_allclose(new[path], value, atol=1e-3)
    small_fn, small = jc.shrink(mlp, new, keep, x)
    np.testing.assert_allclose(small_fn(small, x), mlp(jc.trace.mask(new, groups, keep), x), rtol=1e-4, atol=1e-4)


def test_half_precision_kernels_keep_their_dtype(rng):
    params = {name: w.astype(jnp.bfloat16) for name, w in mlp_params(rng).items()}
    x = jnp.asarray(rng.normal(size=(40, 6)), jnp.bfloat16)
    groups, stats = known(mlp, params, x)
    keep = structured.keep(structured.l1(params, groups), groups, 0.5)
    assert {w.dtype for w in jc.rewrite.liar(params, groups, keep, stats).values()} == {jnp.dtype(jnp.bfloat16)}


# Lasso and ThiNet.


def contributions(params, x):
    h = np.asarray(jax.nn.relu(x @ params["up/kernel"] + params["up/bias"]), np.float64)
    return h[:, :, None] * np.asarray(params["down/kernel"], np.float64)


def test_the_lasso_path_is_that_of_scikit_learn(rng):
    sklearn = pytest.importorskip("sklearn.linear_model")
    params = mlp_params(rng)
    x = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    found = np.asarray(structured.lasso(params, groups, stats, penalties=200)[hidden_of(groups)])
    norms = np.linalg.norm(np.asarray(params["down/kernel"]), axis=1)
    z = contributions(params, x)
    features, target = (z / norms[:, None]).transpose(0, 2, 1).reshape(-1, 10), z.sum(1).ravel()
    alphas, _, path = sklearn.lars_path(features, target, method="lasso")
    entered = np.array([alphas[np.argmax(row != 0) - 1] for row in path]) / alphas[0]
    np.testing.assert_allclose(found, entered, rtol=0.06)  # the grid of penalties
    assert np.argsort(-found).tolist() == np.argsort(-entered).tolist()


def test_lasso_and_refitting_cut_copies_and_dead_channels_first(rng):
    params = mlp_params(rng)
    for name in ("up/kernel", "up/bias"):
        params[name] = params[name].at[..., 7].set(params[name][..., 2]).at[..., 4].set(-1.0 * (name == "up/bias"))
    params["down/kernel"] = params["down/kernel"].at[7].set(params["down/kernel"][2])
    x = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    scores = structured.lasso(params, groups, stats)
    keep = structured.keep(scores, groups, sparsity=0.2)
    cut = set(np.flatnonzero(~np.asarray(keep[hidden_of(groups)])))
    assert cut in ({4, 7}, {4, 2})
    assert error(mlp, params, jc.rewrite.reconstruct(params, groups, keep, stats), groups, keep, x) < 1e-5


def test_thinet_takes_the_greedy_order_of_a_loop(rng):
    params = mlp_params(rng)
    x = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32)
    groups, stats = known(mlp, params, x)
    z, cut = contributions(params, x), []
    while len(cut) < 10:
        rest = [i for i in range(10) if i not in cut]
        cut.append(min(rest, key=lambda i: np.sum(z[:, [*cut, i]].sum(1) ** 2)))
    found = structured.thinet(params, groups, stats)[hidden_of(groups)]
    assert np.argsort(found).tolist() == cut
    np.testing.assert_allclose(np.sort(found), np.arange(1, 11) / 10, rtol=1e-6)


def test_channels_are_chosen_by_blocks_of_convolutions(rng):
    """A channel is nine rows of the next kernel's Gram matrix; a dead one goes first, then what costs least."""
    params = cnn_params(rng)
    params["one/bias"] = params["one/bias"].at[2].set(-1e3)
    x = jnp.asarray(rng.normal(size=(20, 6, 6, 2)), jnp.float32)
    groups, stats = known(cnn, params, x)
    name = hidden_of(groups, "one/kernel", 3)
    h = np.asarray(jax.nn.relu(convolve(x, params["one/kernel"]) + params["one/bias"]))
    alone = [
        float(jnp.sum(convolve(jnp.asarray(h * (np.arange(6) == i)), params["two/kernel"]) ** 2)) for i in range(6)
    ]
    order = np.argsort(structured.thinet(params, groups, stats)[name])
    rest = np.delete(np.arange(6), 2)
    assert order[0] == 2
    assert order[1] == rest[np.argmin(np.asarray(alone)[rest])]
    assert float(structured.lasso(params, groups, stats)[name][2]) == 0


# Zeros and constants.


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_a_dead_unit_is_never_active_and_cutting_it_is_exact(rng, kind):
    fn, params, path, shape = {
        "dense": (mlp, mlp_params(rng), "up/kernel", (50, 6)),
        "convolution": (cnn, cnn_params(rng), "two/kernel", (20, 6, 6, 2)),
    }[kind]
    bias = path.replace("kernel", "bias")
    params[bias] = params[bias].at[1].set(-1e3)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    groups, stats = known(fn, params, x)
    name = hidden_of(groups, path, params[path].ndim - 1)
    active = structured.apoz(params, groups, stats)[name]
    assert float(active[1]) == 0
    assert float(jnp.delete(active, 1).min()) > 0
    keep = {name: active > 0}
    assert bool(jnp.all(fn(jc.trace.mask(params, groups, keep), x) == fn(params, x)))
    if kind == "dense":
        h = jax.nn.relu(x @ params["up/kernel"] + params["up/bias"])
        np.testing.assert_allclose(active, (h != 0).mean(0), rtol=1e-6)


def test_padding_is_no_inactivity(rng):
    def fn(p, x):
        return convolve(jax.nn.relu(convolve(x, p["a"], "SAME")), p["b"], "SAME").sum((1, 2))

    params = {"a": (3, 3, 1, 4), "b": (3, 3, 4, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in params.items()}
    params["a"] = params["a"].at[..., 0].set(1.0)
    x = jnp.asarray(rng.uniform(1, 2, size=(5, 4, 4, 1)), jnp.float32)
    groups, stats = known(fn, params, x)
    assert float(structured.apoz(params, groups, stats)[hidden_of(groups, "a", 3)][0]) == 1


def test_a_channel_whose_norm_has_scale_zero_folds_into_the_next_bias(rng):
    def fn(p, x):
        x = convolve(x, p["one/kernel"])
        x = (x - p["norm/mean"]) / jnp.sqrt(p["norm/var"] + 1e-5) * p["norm/scale"] + p["norm/bias"]
        return convolve(jax.nn.relu(x), p["two/kernel"]) + p["two/bias"]

    params = cnn_params(rng)
    params = {name: params[name] for name in ("one/kernel", "two/kernel", "two/bias")}
    params |= {f"norm/{name}": jnp.asarray(rng.uniform(0.5, 2, 6), jnp.float32) for name in ("mean", "var", "bias")}
    params["norm/scale"] = jnp.asarray(rng.normal(size=6), jnp.float32).at[jnp.array([1, 4])].set(0)
    x = jnp.asarray(rng.normal(size=(10, 6, 6, 2)), jnp.float32)
    groups = jc.trace.coupling(fn, params, x)
    name = hidden_of(groups, "one/kernel", 3)
    keep = {name: structured.slimming(params, {name: groups[name]}, "norm/scale")[name] > 0}
    assert keep[name].tolist() == [True, False, True, True, False, True]
    folded = jc.rewrite.fold_constants(params, groups, keep, {name: jax.nn.relu(params["norm/bias"])})
    assert error(fn, params, params, groups, keep, x) > 0.05
    assert error(fn, params, folded, groups, keep, x) < 1e-5
    small_fn, small = jc.shrink(fn, folded, keep, x)
    np.testing.assert_allclose(small_fn(small, x), fn(params, x), rtol=1e-4, atol=1e-4)


def test_constants_fold_into_a_running_mean_too(rng):
    def fn(p, x):
        return (jax.nn.relu(x @ p["a"] + p["c"]) @ p["w"] - p["mean"]) * p["scale"]

    shapes = {"a": (3, 4), "c": (4,), "w": (4, 2), "mean": (2,), "scale": (2,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params["a"] = params["a"].at[:, 1].set(0)
    params["c"] = params["c"].at[1].set(2.0)
    x = jnp.asarray(rng.normal(size=(10, 3)), jnp.float32)
    groups = jc.trace.coupling(fn, params, x)
    name = hidden_of(groups, "a")
    keep = {name: jnp.arange(4) != 1}
    values = {name: jax.nn.relu(params["c"])}
    folded = jc.rewrite.fold_constants(params, groups, keep, values)
    assert error(fn, params, folded, groups, keep, x) < 1e-6
    only = {name: groups[name]}
    with pytest.raises(ValueError, match=r"w: it reads .* has no bias to take the constants"):
        jc.rewrite.fold_constants(params, only, keep, values)
    wrong = params | {"shift": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"shift: found shape \(4,\), expected the last axes of \(2,\)"):
        hand = jc.trace.Group(4, (("w", 1), ("shift", 0)))
        jc.rewrite.fold_constants(wrong, only | {"hand": hand}, keep, values)


# What is missing.


def test_missing_or_unfitting_statistics_are_explained(rng):
    params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    groups = {"g": jc.trace.Group(size=4, producers=(("up", 1),), consumers=(("down", 0),))}
    keep = {"g": jnp.arange(4) < 2}
    with pytest.raises(ValueError, match=r"down: the group 'g' needs 'gram' .* pass stats=jc.calibrate"):
        jc.rewrite.reconstruct(params, groups, keep, {})
    with pytest.raises(ValueError, match=r"down: the group 'g' needs 'zeros'"):
        structured.apoz(params, groups, {"down": types.SimpleNamespace(axes=(0,))})
    stat = types.SimpleNamespace(gram=jnp.eye(3), axes=(0,))
    with pytest.raises(ValueError, match=r"down: found 'gram' of shape \(3, 3\).*expected 4 features"):
        structured.thinet(params, groups, {"down": stat})
    stat = types.SimpleNamespace(gram=jnp.eye(4), axes=(0,))
    with pytest.raises(ValueError, match=r"down: the bias is refitted from 'sum' and 'count'"):
        jc.rewrite.reconstruct(params, groups, keep, {"down": stat}, biases=True)
    stat = types.SimpleNamespace(gram=jnp.eye(4), axes=(0,), sum=jnp.ones(4), count=3)
    with pytest.raises(ValueError, match=r"shift: found shape \(3,\), expected \(2,\), the outputs of down"):
        hand = jc.trace.Group(3, (("down", 1), ("shift", 0)))
        bare = {"up": params["up"], "down": params["down"], "shift": jnp.ones(3)}
        jc.rewrite.reconstruct(bare, groups | {"hand": hand}, keep, {"down": stat}, biases=True)
    with pytest.raises(ValueError, match=r"g: no kernel reads this group"):
        structured.lasso(params, {"g": jc.trace.Group(size=4, producers=(("up", 1),))}, {})
    tied = types.SimpleNamespace(gram=jnp.eye(4), axes=(0,), others=(stat,))
    with pytest.raises(ValueError, match=r"down: found a kernel that is used in several ways"):
        jc.rewrite.reconstruct(params, groups, keep, {"down": tied})
    with pytest.raises(ValueError, match=r"h: there is no such group"):
        jc.rewrite.reconstruct(params, groups, {"h": keep["g"]}, {"down": stat})
