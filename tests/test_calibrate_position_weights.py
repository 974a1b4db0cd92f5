"""Weights of positions found from a loss: against derivatives taken by hand, in loops and out of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments.models import llama

CONFIG = llama.Config(vocab=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
LOSS = functools.partial(llama.loss, config=CONFIG)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def squares(by_product, params, x):
    """The mean square over outputs of the derivative by what is added to each product, to a mean of 1."""
    shapes = jax.eval_shape(lambda p: by_product(p, x, [0.0] * 9)[1], params)
    grads = jax.grad(lambda added: by_product(params, x, added)[0])([jnp.zeros(s.shape) for s in shapes])
    found = [jnp.mean(g**2, -1, keepdims=True) for g in grads]
    return [g / g.mean() for g in found]


def net(p, x, added):
    a = x @ p["a"] + added[0]
    b = jnp.tanh(a) @ p["b"] + added[1]
    c = jnp.tanh(b) @ p["a"] + added[2]  # a second time
    return jnp.sum(jnp.sin(c)), [a, b, c]


def test_weights_are_squared_derivatives_by_products():
    p, x = {"a": normal(0, 5, 4), "b": normal(1, 4, 5)}, normal(2, 3, 6, 5)
    found = jc.trace.position_weights(lambda p, x: net(p, x, [0.0] * 3)[0], p, x)
    first, middle, last = squares(net, p, x)
    assert [w.shape for w in found["a"]] == [(3, 6, 1)] * 2
    for a, b in zip([*found["a"], *found["b"]], [first, last, middle], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    stats = jc.calibrate(lambda p, x: net(p, x, [0.0] * 3)[1], p, [x], where=found)
    second = jnp.tanh(net(p, x, [0.0] * 3)[1][1])
    gram = sum(jnp.einsum("bti,btj->ij", x * w, x) for x, w in ((x, first), (second, last)))
    np.testing.assert_allclose(stats["a"].gram, gram, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["a"].count, 36, rtol=1e-5)


def test_layers_in_a_loop_have_weights_of_their_own():
    unrolled = llama.init(jax.random.key(0), CONFIG)
    stacked = llama.stack(unrolled)
    a, b = (jax.jit(functools.partial(jc.trace.position_weights, LOSS))(p, TOKENS) for p in (unrolled, stacked))
    fn = functools.partial(llama.apply, config=CONFIG)
    one, other = (jc.calibrate(fn, p, [TOKENS], statistics=["gram"], where=w) for p, w in ((unrolled, a), (stacked, b)))
    for name in ("attention/q/kernel", "attention/v/kernel", "attention/out/kernel", "mlp/down/kernel"):
        for i in range(2):
            np.testing.assert_allclose(a[f"layers/{i}/{name}"][0], b[f"layers/{name}"][0][i], rtol=1e-3, atol=1e-5)
            gram = one[f"layers/{i}/{name}"].gram
            np.testing.assert_allclose(gram, other[f"layers/{name}"].gram[i], rtol=1e-3, atol=1e-3)
    first = a["layers/0/attention/v/kernel"][0][:, :, 0].mean(0)
    assert first[0] > 1 and first[-1] == 0  # all read the first value; the last serves no loss


def joined(p, x):
    y = jnp.tanh(x @ jnp.concatenate([p["a"], p["b"]], 1))
    return jnp.sum(y[:, :3] * y[:, 3:6] + y[:, :3] ** 2)


def test_parameters_side_by_side_in_one_product():
    p, x = {"a": normal(0, 4, 3), "b": normal(1, 4, 3)}, normal(2, 5, 4)

    def apart(p, x):
        a, b = jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"])
        return jnp.sum(a * b + a**2)

    found, expected = jc.trace.position_weights(joined, p, x), jc.trace.position_weights(apart, p, x)
    for path in p:
        np.testing.assert_allclose(found[path][0], expected[path][0], rtol=1e-5)
    assert not np.allclose(found["a"][0], found["b"][0])


def test_experts_and_convolutions():
    def loss(p, x):
        y = jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.sum(jnp.sin(jnp.einsum("ebtd,edf->ebtf", jnp.stack([y, jnp.cos(y)]), p["up"])))

    p, x = {"k": normal(0, 3, 4, 6), "up": normal(1, 2, 6, 5)}, normal(2, 3, 7, 4)
    found = jc.trace.position_weights(loss, p, x)
    assert found["k"][0].shape == (3, 7, 1) and found["up"][0].shape == (2, 3, 7, 1)
    stats = jc.calibrate(lambda p, x: loss(p, x), p, [x], where=found)
    assert not stats.unread and stats["up"].gram.shape == (2, 6, 6)
    plain = jc.calibrate(lambda p, x: loss(p, x), p, [x], where={"k": jnp.ones((3, 7, 1))})
    np.testing.assert_allclose(plain["k"].gram, jc.calibrate(loss, p, [x])["k"].gram, rtol=1e-5)


def test_what_does_not_fit_is_named():
    p, x = {"w": normal(0, 4, 3)}, normal(1, 5, 4)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(ValueError, match="expected one scalar"):
        jc.trace.position_weights(fn, p, x)
    with pytest.raises(ValueError, match=r"w: found weights of shape \(4, 1\) in where, expected \(5, 1\)"):
        jc.calibrate(fn, p, [x], where={"w": jnp.ones((4, 1))})
    with pytest.raises(ValueError, match=r"where: found weights of 'v', which is no parameter; there are w"):
        jc.calibrate(fn, p, [x], where={"v": jnp.ones((5, 1))})
    with pytest.raises(ValueError, match="weights of 1 of its products, and it is in more"):
        jc.calibrate(lambda p, x: fn(p, x) + fn(p, 2 * x), p, [x], jc.plan(p, [("w", jc.quantize.GPTQ(bits=4))]),
                     where={"w": jnp.ones((5, 1))})  # fmt: skip


METHODS = {
    "gptq": jc.quantize.GPTQ(bits=3),
    "sparsegpt": jc.prune.SparseGPT(sparsity=0.5),
    "wanda": jc.prune.Wanda(sparsity=0.5),
    "awq": jc.quantize.AWQ(grid=jc.quantize.Int(bits=3)),
    "low rank": jc.factorize.Whitened(jc.factorize.SVD(rank=2)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_weighted_statistics(name):
    """Weights of 0 and 1 are booleans, one of 2 is a position that is there twice; Gram matrices alone suffice."""
    p, x = {"w": normal(0, 8, 6)}, normal(1, 20, 8)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = jc.plan(p, [("w", METHODS[name])])

    def made(x, where=None, **options):
        stats = jc.calibrate(fn, p, [x], None if options else plan, where=where, **options)
        return jc.materialize(jc.compress(p, plan, stats=stats))["w"]

    mask = jnp.arange(20) % 3 > 0
    kept = made(x[mask])
    np.testing.assert_allclose(made(x, mask), kept, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made(x, mask.astype(jnp.float32)), kept, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made(x, {"w": mask[:, None]}), kept, rtol=1e-4, atol=1e-5)
    twice = jnp.where(jnp.arange(20) < 3, 2.0, 1.0)
    np.testing.assert_allclose(made(x, twice), made(jnp.concatenate([x, x[:3]])), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made(x, twice, statistics=["gram", "count"]), made(x, twice), rtol=1e-4, atol=1e-5)
