"""Codebooks with weights: by curvature, by the bits of indices, and by the error of outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.numeric.blocks import blocked
from jcompress.numeric.entropy import rate
from jcompress.share.optimal import optimal_codebook

KMeans = jc.share.KMeans


def known(**stats):
    return jc.Context(stats=jc.trace.Stats(**stats, axes=(-2,)), path="w")


def drawn(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def curved(rng, *shape):
    return jnp.asarray(rng.exponential(size=shape) ** 2, jnp.float32)


def inputs(rng, k):
    x = rng.normal(size=(200, k)) @ (rng.normal(size=(k, k)) * np.exp(-np.arange(k) / 5)[:, None])
    return jnp.asarray(x.T @ x, jnp.float32)


def lagrangian(node, w, h, price, rows=lambda x: x):
    error = jnp.sum(h * jnp.square(node.materialize() - w)) / jnp.mean(h * jnp.square(w))
    return float(error + price * rate(jnp.bincount(node.indices.ravel(), length=node.clusters)))


def moved(node, w, gram):
    change = node.materialize() - w
    return float(jnp.sum(change * (gram @ change)))


def test_equal_weights_are_no_weights(rng):
    w = drawn(rng, 16, 8)
    plain = KMeans(5)(w)
    same = KMeans(5, weigh="grad_square")(w, known(grad_square=jnp.full((16, 8), 3.0)))
    np.testing.assert_array_equal(same.indices, plain.indices)
    np.testing.assert_allclose(same.codebook, plain.codebook, atol=1e-6)


def test_values_are_weighted_means_of_their_nearest_weights(rng):
    w, h = drawn(rng, 16, 8), curved(rng, 16, 8)
    node = KMeans(4, weigh="hessian_diagonal")(w, known(hessian_diagonal=h))
    nearest = np.abs(np.asarray(w)[..., None] - np.asarray(node.codebook)).argmin(-1)
    np.testing.assert_array_equal(nearest, node.indices)
    for k in range(4):
        own = nearest == k
        np.testing.assert_allclose(node.codebook[k], np.average(np.asarray(w)[own], weights=np.asarray(h)[own]), 1e-3)


def test_few_weighted_values_reach_the_best_intervals(rng):
    w, h = drawn(rng, 12, 1), curved(rng, 12, 1)
    order = np.argsort(np.asarray(w).ravel())
    x, weight = np.asarray(w, np.float64).ravel()[order], np.asarray(h, np.float64).ravel()[order]

    def error(cuts):
        parts = zip(np.split(x, cuts), np.split(weight, cuts), strict=True)
        return sum((v * (p - np.average(p, weights=v)) ** 2).sum() for p, v in parts)

    best = min(error(cuts) for cuts in itertools.combinations(range(1, 12), 2))
    node = KMeans(3, weigh="hessian_diagonal")(w, known(hessian_diagonal=h))
    plain = KMeans(3)(w)
    found, before = (float((h * jnp.square(n.materialize() - w)).sum()) for n in (node, plain))
    assert best * (1 - 1e-3) <= found <= before


def test_many_weighted_values_are_near_the_optimum(rng):
    # Weights that are whole numbers: the optimum is that of as many equal values.
    w, h = drawn(rng, 500, 4), jnp.asarray(rng.geometric(0.2, size=(500, 4)), jnp.float32)
    best = optimal_codebook(np.repeat(np.asarray(w).ravel(), np.asarray(h, int).ravel()), 16)
    least = float((np.asarray(h) * np.square(np.asarray(w)[..., None] - best).min(-1)).sum())
    nodes = [KMeans(16, weigh=name)(w, known(hessian_diagonal=h)) for name in ("hessian_diagonal", None)]
    found, plain = (float((h * jnp.square(n.materialize() - w)).sum()) for n in nodes)
    assert least * (1 - 1e-4) <= found <= 1.01 * least < plain


@pytest.mark.parametrize("block", [(), (2, 2)])
def test_at_a_price_bits_fall_and_the_sum_is_less(rng, block):
    w, h = drawn(rng, 64, 32), curved(rng, 64, 32)
    stats = known(grad_square=h)
    nodes = [KMeans(16, block=block, weigh="grad_square", price=p)(w, stats) for p in (0.0, 0.1, 0.5)]
    bits = [float(rate(jnp.bincount(n.indices.ravel(), length=16))) for n in nodes]
    assert bits[0] > 1.05 * bits[1] > 1.1 * bits[2]
    for node, price in zip(nodes[1:], (0.1, 0.5), strict=True):
        assert lagrangian(node, w, h, price) < lagrangian(nodes[0], w, h, price)
    # Every index is the cheapest one under the code lengths of all.
    node, rows = nodes[1], (lambda x: blocked(x, block) if block else x[..., None])
    cost = np.square(np.asarray(rows(w))[..., None, :] - np.asarray(node.codebook).reshape(16, -1))
    cost = (cost * np.asarray(rows(h))[..., None, :]).sum(-1) / float(jnp.mean(h * w * w))
    counts = np.bincount(np.asarray(node.indices).ravel(), minlength=16)
    with np.errstate(divide="ignore"):
        cost = cost - 0.1 * np.log2(counts / counts.sum())
    taken = np.take_along_axis(cost, np.asarray(node.indices)[..., None].astype(int), -1)[..., 0]
    assert (taken <= cost.min(-1) + 0.02 * cost.min(-1).mean()).mean() > 0.98


@pytest.mark.parametrize("block", [(), (4, 1), (2, 2)])
def test_outputs_weigh_and_are_nearer_than_without(rng, block):
    w, gram = drawn(rng, 16, 12), inputs(rng, 16)
    plain, node = KMeans(6, block=block)(w), KMeans(6, block=block, weigh="gram")(w, known(gram=gram))
    assert moved(node, w, gram) < 0.6 * moved(plain, w, gram)
    assert node.nbits() == plain.nbits()
    words = jax.grad(lambda c: moved_(node, c, w, gram))(node.codebook)  # fitted to the outputs
    assert float(jnp.abs(words).max()) < 0.05 * float(jnp.abs(gram @ w).max())


def moved_(node, codebook, w, gram):
    change = type(node)(node.indices, codebook, node.clusters, node.ndim, node.block).materialize() - w
    return jnp.sum(change * (gram @ change))


@pytest.mark.parametrize("block", [(), (2, 2)])
def test_no_single_index_would_do_better(rng, block):
    """Coordinate descent ends where every index is the best one while all others stay, but for the last fit."""
    w, gram = drawn(rng, 8, 6), inputs(rng, 8)
    damped = gram + 0.01 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(8)
    node = KMeans(3, block=block, weigh="gram")(w, known(gram=gram))
    now, better = moved(node, w, damped), 0
    for place in np.ndindex(node.indices.shape):
        for k in range(3):
            other = type(node)(node.indices.at[place].set(k), node.codebook, 3, 2, block)
            better += moved(other, w, damped) < now * (1 - 1e-2)
    assert better <= 1


def test_with_unrelated_inputs_outputs_weigh_nothing(rng):
    w = drawn(rng, 16, 8)
    plain, node = KMeans(4)(w), KMeans(4, weigh="gram")(w, known(gram=7 * jnp.eye(16)))
    errors = [float(jnp.square(n.materialize() - w).sum()) for n in (node, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_hidden_weights_do_not_weigh(rng):
    w, gram = drawn(rng, 16, 8), inputs(rng, 16)
    stats = {"w": known(gram=gram).stats}
    for method in (KMeans(4, weigh="gram"), KMeans(4, block=(2, 2), weigh="gram")):
        both = (
            jc.chain(jc.prune.Magnitude(sparsity=0.5), method),
            jc.chain(jc.prune.Magnitude(sparsity=0.5), KMeans(4, block=method.block)),
        )
        near, plain = (jc.compress({"w": w}, jc.plan({"w": w}, [("w", m)]), stats=stats)["w"] for m in both)
        kept = jnp.where(near.mask, w, 0)
        np.testing.assert_array_equal(near.mask, plain.mask)
        assert moved(near, kept, gram) < moved(plain, kept, gram)


def test_one_codebook_for_all_layers_weighs_all(rng):
    params = {"a": drawn(rng, 16, 8), "b": drawn(rng, 16, 4)}
    grams = {name: inputs(rng, 16) for name in params}
    stats = {name: known(gram=gram).stats for name, gram in grams.items()}

    def error(method):
        small = jc.compress(params, jc.plan(params, [(".*", method)]), stats=stats)
        dense = jc.materialize(small)
        return small, sum(float(((dense[n] - params[n]) * (grams[n] @ (dense[n] - params[n]))).sum()) for n in params)

    small, found = error(KMeans(5, scope="global", weigh="gram"))
    assert found < 0.6 * error(KMeans(5, scope="global"))[1]
    assert jc.nbits(small) == 3 * (128 + 64) + 5 * 32


def test_convolutions_in_groups_weigh_by_their_own_inputs(rng):
    w, grams = drawn(rng, 3, 3, 2, 8), jnp.stack([inputs(rng, 18) for _ in range(2)])
    stats = jc.Context(stats=jc.trace.Stats(gram=grams, axes=(-4, -3, -2)), path="w")
    both = [KMeans(5, block=(1, 1, 2, 2), weigh=weigh)(w, stats) for weigh in ("gram", None)]

    def error(node):
        change = (node.materialize() - w).reshape(18, 2, 4).transpose(1, 0, 2)
        return float(jnp.sum(change * (grams @ change)))

    assert error(both[0]) < 0.7 * error(both[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weigh": "size"}, "weigh='size'"),
        ({"price": -1.0}, "price=-1.0 must be at least 0"),
        ({"exact": True, "price": 0.1}, "no weights and no price"),
    ],
)
def test_bad_weights(options, message):
    with pytest.raises(ValueError, match=message):
        KMeans(4, **options)


def test_what_weighs_must_be_there(rng):
    params = {"w": drawn(rng, 4, 4)}
    plan = jc.plan(params, [("w", KMeans(2, weigh="grad_square"))])
    with pytest.raises(ValueError, match=r"w: KMeans needs 'stats.grad_square'"):
        jc.compress(params, plan)
