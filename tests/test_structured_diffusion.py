"""Graph diffusion against a dense linear solve, and its penalty against sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.prune import structured


def random_params(rng, **shapes):
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


def residual(p, x):
    x = x @ p["a"]
    return (x + jax.nn.relu(x @ p["b"]) @ p["c"]) @ p["d"]


def solved(matrices, sizes, names, start, damping):
    """The same by one dense system: ``matrices[read, written]`` hold magnitudes."""
    offsets = dict(zip(names, np.cumsum([0, *[sizes[n] for n in names[:-1]]]), strict=True))
    n = sum(sizes.values())
    adjacency = np.zeros((n, n))
    for (source, out), w in matrices:
        rows, columns = offsets[source], offsets[out]
        adjacency[rows : rows + sizes[source], columns : columns + sizes[out]] += np.abs(w)
    fed = adjacency.sum(0)
    steps = adjacency / np.where(fed > 0, fed, 1)
    steps[:, fed == 0] = start[:, None]
    return np.linalg.solve(np.eye(n) - damping * steps, (1 - damping) * start)


@pytest.mark.parametrize("damping", [0.5, 0.85, 0.99])
def test_a_chain_solves_the_linear_system(rng, damping):
    params = random_params(rng, a=(3, 6), b=(6, 5), c=(5, 2))
    params["b"] = params["b"].at[:, 2].set(0)
    groups = jc.trace.coupling(mlp, params, jnp.ones((4, 3)))
    scores = structured.diffusion(params, groups, ["a", "b", "c"], damping=damping)
    names = ["a[0]", "a[1]", "b[1]", "c[1]"]
    matrices = [((f"{k}[0]" if k == "a" else f"{j}[1]", f"{k}[1]"), params[k]) for j, k in ("aa", "ab", "bc")]
    start = np.concatenate([np.zeros(14), [0.5, 0.5]])
    expected = solved(matrices, {n: groups[n].size for n in names}, names, start, damping)
    np.testing.assert_allclose(np.concatenate([scores[n] for n in names]), expected, atol=1e-6)
    assert sum(float(x.sum()) for x in scores.values()) == pytest.approx(1, abs=1e-5)


def test_residual_sums_share_what_feeds_them(rng):
    params = random_params(rng, a=(3, 4), b=(4, 5), c=(5, 4), d=(4, 2))
    groups = jc.trace.coupling(residual, params, jnp.ones((6, 3)))
    stream = next(name for name, group in groups.items() if ("d", 0) in group.members)
    restart = {"d[1]": jnp.array([1.0, 3.0])}
    scores = structured.diffusion(params, groups, list("abcd"), restart)
    names = ["a[0]", stream, "b[1]", "d[1]"]
    matrices = [
        (("a[0]", stream), params["a"]),
        ((stream, "b[1]"), params["b"]),
        (("b[1]", stream), params["c"]),
        ((stream, "d[1]"), params["d"]),
    ]
    start = np.concatenate([np.zeros(12), [0.25, 0.75]])
    expected = solved(matrices, {n: groups[n].size for n in names}, names, start, 0.85)
    np.testing.assert_allclose(np.concatenate([scores[n] for n in names]), expected, atol=1e-6)


def test_convolutions_sum_over_their_window_and_places(rng):
    params = random_params(rng, conv=(3, 3, 2, 4), out=(36, 5))

    def cnn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "VALID", dimension_numbers=dims)
        return jax.nn.relu(y).reshape(x.shape[0], -1) @ p["out"]

    groups = jc.trace.coupling(cnn, params, jnp.ones((2, 5, 5, 2)))
    channels = next(name for name, group in groups.items() if ("conv", 3) in group.members)
    scores = structured.diffusion(params, groups, ["out"], {"out[1]": jnp.ones(5)} if "out[1]" in groups else None)
    flat = np.abs(params["out"]).reshape(9, 4, 5).sum(0)
    expected = (flat / flat.sum(0)).sum(1)
    found = np.asarray(scores[channels])
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-5)


def test_units_that_nothing_reads_have_no_importance(rng):
    params = random_params(rng, a=(3, 6), b=(6, 5), c=(5, 2))
    params["b"] = params["b"].at[1].set(0)
    groups = jc.trace.coupling(mlp, params, jnp.ones((4, 3)))
    score = jax.jit(lambda p: structured.diffusion(p, groups, list("abc")))(params)["a[1]"]
    assert score[1] == 0
    assert (jnp.delete(score, 1) > 0).all()


def test_the_penalty_is_the_weighted_sum_and_spares_the_best(rng):
    params = random_params(rng, a=(3, 4), b=(4, 2))
    hidden = {"hidden": jc.trace.Group(size=4, producers=(("a", 1),), consumers=(("b", 0),))}
    scores = {"hidden": jnp.array([1.0, 4.0, 0.0, 2.0])}
    a = np.asarray(params["a"], np.float64)
    costs = 0.3 * np.abs(a).sum(0) + 0.7 * np.square(a).sum(0)
    penalty = structured.weighted_penalty(params, hidden, scores, l1=0.3, l2=0.7)
    assert float(penalty) == pytest.approx(float(np.dot(costs, [0.75, 0, 1, 0.5])), rel=1e-5)
    grads = jax.grad(lambda p: structured.weighted_penalty(p, hidden, scores, 0.3, 0.7))(params)
    np.testing.assert_array_equal(grads["a"][:, 1], 0)
    np.testing.assert_allclose(grads["a"][:, 2], 0.3 * np.sign(a[:, 2]) + 1.4 * a[:, 2], rtol=1e-5)
    np.testing.assert_array_equal(grads["b"], 0)


def test_errors_name_what_is_wrong(rng):
    params = random_params(rng, a=(3, 6), b=(6, 5), c=(5, 2))
    groups = jc.trace.coupling(mlp, params, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="damping=1"):
        structured.diffusion(params, groups, ["a"], damping=1.0)
    with pytest.raises(ValueError, match="nowhere: the chain does not touch"):
        structured.diffusion(params, groups, ["a"], {"nowhere": jnp.ones(2)})
    hidden = {"hidden": jc.trace.Group(size=6, producers=(("a", 1),))}
    with pytest.raises(ValueError, match="a: no group reads this kernel"):
        structured.diffusion(params, hidden, ["a"])
    with pytest.raises(ValueError, match="other: there is no such group"):
        structured.weighted_penalty(params, groups, {"other": jnp.ones(2)}, 0.1)
