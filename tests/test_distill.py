"""Losses between a student and a teacher."""

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc


def logits(seed, shape=(6, 5)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_soft_targets_is_cross_entropy_less_the_teachers_entropy():
    s, t = logits(0), logits(1)
    for temperature in (1.0, 4.0):
        p, q = (np.asarray(jax.nn.softmax(z / temperature), np.float64) for z in (t, s))
        want = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1).mean()
        np.testing.assert_allclose(jc.distill.soft_targets(s, t, temperature=temperature), want, rtol=1e-4)


def test_it_vanishes_at_the_teacher_and_no_gradient_reaches_the_teacher():
    t = logits(1)
    assert abs(float(jc.distill.soft_targets(t, t, temperature=3.0))) < 1e-6
    gradient = jax.grad(lambda t: jc.distill.soft_targets(logits(0), t))(t)
    np.testing.assert_array_equal(gradient, 0)


def test_at_high_temperature_the_gradient_is_that_of_logit_matching():
    s, t = (z - z.mean(-1, keepdims=True) for z in (logits(0), logits(1)))
    gradient = jax.grad(lambda s: jc.distill.soft_targets(s, t, temperature=1000.0))(s)
    np.testing.assert_allclose(gradient, (s - t) / s.shape[1] / s.shape[0], atol=2e-4)


def test_the_loss_does_not_depend_on_the_order_of_the_batch():
    order = np.random.default_rng(0).permutation(6)
    a, b = jc.distill.soft_targets(logits(0), logits(1)), jc.distill.soft_targets(logits(0)[order], logits(1)[order])
    np.testing.assert_allclose(a, b, rtol=1e-6)
