"""Training and rounding for the coded size: fixed points, closed forms, and the bits of real files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

import jcompress as jc
from jcompress.numeric.entropy import code_lengths

RD, T, Int = jc.quantize.RateDistortion, jc.quantize.training, jc.quantize.Int
W = jax.random.laplace(jax.random.key(0), (96, 64))


def lengths_of(codes, low, symbols, floor=0.01):
    return np.asarray(code_lengths(np.bincount((codes - low).ravel(), minlength=symbols), floor=floor))


@pytest.mark.parametrize("price", [0.05, 0.2])
@pytest.mark.parametrize("weigh", [None, "grad_square"])
def test_no_other_code_is_better_for_any_weight(price, weigh):
    """A fixed point of choosing codes and counting them; the grid's own scale, before it is refitted."""
    grid = Int(bits=4, axis=None)
    h = jax.random.gamma(jax.random.key(1), 1.0, W.shape) if weigh else jnp.ones(W.shape)
    context = jc.Context(stats=jc.trace.Stats(grad_square=h))
    node, scale = RD(price, grid, weigh)(W, context), float(grid(W).scale.reshape(()))
    h, codes = np.asarray(h / h.mean()), np.asarray(node.codes, int)
    cost = h[..., None] * (np.asarray(W / scale)[..., None] - np.arange(-7, 8)) ** 2 + price * lengths_of(codes, -7, 15)
    taken = np.take_along_axis(cost, codes[..., None] + 7, -1)[..., 0]
    assert (taken <= cost.min(-1) + 1e-3).mean() > 0.99  # candidates are a few, and the last count moves some


def test_fewer_bits_at_equal_error():
    wide = jc.quantize.ranges.Fixed(None, 15 * 2.0)
    grid = Int(bits=5, axis=None, clip=wide)
    plain, priced = grid(W), RD(0.05, grid)(W)
    error = [float(((node.materialize() - W) ** 2).mean()) for node in (plain, priced)]
    bits = [jc.nbits({"w": node}, coded=True) for node in (plain, priced)]
    assert error[1] < 1.02 * error[0]
    assert bits[1] < 0.95 * bits[0]


def test_the_curve_of_rate_and_error_falls():
    found = []
    for price in (0.0, 0.1, 0.3, 1.0):
        node = RD(price, Int(bits=4, axis=None))(W)
        found.append((jc.nbits({"w": node}, coded=True), float(((node.materialize() - W) ** 2).mean())))
    assert [bits for bits, _ in found] == sorted((bits for bits, _ in found), reverse=True)
    assert [error for _, error in found] == sorted(error for _, error in found)
    np.testing.assert_array_equal(RD(0.0, Int(bits=4))(W).codes, Int(bits=4)(W).codes)


def test_affine_grids_and_weights_that_matter():
    node = RD(0.1, Int(bits=4, symmetric=False))(W)
    assert int(node.codes.min()) >= 0 and int(node.codes.max()) <= 15
    heavy = jnp.where(jnp.arange(64) < 32, 1.9, 0.1) * jnp.ones(W.shape)
    node = RD(0.3, Int(bits=4, axis=None), "hessian_diagonal")(
        W, jc.Context(stats=jc.trace.Stats(hessian_diagonal=heavy))
    )
    error = ((node.materialize() - W) ** 2).mean(0)
    assert float(error[:32].mean()) < 0.5 * float(error[32:].mean())


@pytest.mark.parametrize("make", [lambda: RD(-1.0), lambda: RD(0.1, Int(bits=1)), lambda: RD(0.1, weigh="gram")])
def test_bad_settings_of_rounding(make):
    with pytest.raises(ValueError, match="RateDistortion: "):
        make()


# Learned densities.


def test_bits_are_those_of_the_mixture():
    values = jnp.array([0.3, -4.0, 2.0, 40.0])
    density = jnp.array([[0.5, -0.5], [0.0, 1.0], [0.2, 1.0]])
    node = jc.formats.Latent(values, jnp.zeros((1,)), density)
    parts, expected = jax.nn.softmax(density[0]), 0.0
    for v in values.tolist():
        mass = sum(
            float(p) * scipy.integrate.quad(scipy.stats.logistic(m, np.exp(s)).pdf, v - 0.5, v + 0.5)[0]
            for p, m, s in zip(parts, density[1].tolist(), density[2].tolist(), strict=True)
        )
        expected -= np.log2(mass)
    assert float(node.bits()) == pytest.approx(expected, rel=1e-4)
    slope = jax.grad(lambda v: jc.formats.Latent(v, jnp.zeros((1,)), density).bits())(values)
    assert np.isfinite(slope).all() and float(slope[3]) > 0 > float(slope[1])


def test_the_value_is_rounded_and_the_gradient_is_not():
    node = T.EntropyPenalized(levels=7)(W)
    step = float(jnp.exp(node.log_step).reshape(()))
    np.testing.assert_allclose(node.materialize(), step * jnp.round(W / step), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jc.finalize({"w": node})["w"].materialize(), node.materialize())
    slope = jax.grad(lambda n: n.materialize().sum(), allow_int=True)(node).values
    np.testing.assert_allclose(slope, step, rtol=1e-5)


def test_training_makes_the_file_small_and_the_rate_says_how_small():
    """A sparse map from many inputs is learned; what does not matter goes to zero and costs next to nothing."""
    k1, k2, k3 = jax.random.split(jax.random.key(2), 3)
    planted = jnp.where(jax.random.uniform(k1, (60, 40)) < 0.1, jax.random.normal(k2, (60, 40)), 0.0)
    x = jax.random.normal(k3, (256, 60))
    start = {"w": planted + 0.3 * jax.random.normal(k1, planted.shape)}
    tree = jc.compress(start, jc.plan(start, [("w", T.EntropyPenalized())]))
    train, held = jc.split(tree)
    tx = optax.adam(0.02)

    def loss(train, key):
        tree = jc.merge(train, held)
        error = ((x @ (jc.materialize(tree)["w"] - planted)) ** 2).mean()
        return error + 2e-4 * T.rate(tree, key)

    @jax.jit
    def run(train):
        def step(carry, key):
            train, state = carry
            updates, state = tx.update(jax.grad(loss)(train, key), state)
            return (optax.apply_updates(train, updates), state), None

        return jax.lax.scan(step, (train, tx.init(train)), jax.random.split(jax.random.key(3), 600))[0][0]

    before = jc.finalize(tree)
    trained = jc.merge(run(train), held)
    after = jc.finalize(trained)
    assert jc.nbits(after, coded=True) < 0.5 * jc.nbits(before, coded=True)
    error = [float(((jc.materialize(t)["w"] - planted) ** 2).mean()) for t in (before, after)]
    assert error[1] < 0.5 * error[0]
    said = float(T.rate(trained, jax.random.key(4)))
    assert 0.8 * said < jc.nbits(after, coded=True) < 1.2 * said


def test_bad_settings_of_training():
    for options in ({"bits": 1}, {"levels": 200}, {"components": 0}):
        with pytest.raises(ValueError, match="EntropyPenalized: found"):
            T.EntropyPenalized(**options)
    assert float(T.rate({"w": W})) == 0.0
