"""Scores of weights, for masks of any kind and for units."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.prune import scores
from jcompress.prune.masks.scored import ByScore


def test_scores_equal_their_formulas(rng):
    w, g, h = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(3))
    stats = types.SimpleNamespace(grad_square=g**2, hessian_diagonal=h)
    context = jc.Context(grad=g, stats=stats, key=jax.random.key(0))
    expected = {
        scores.magnitude: np.abs(w),
        scores.squared: w * w,
        scores.taylor: np.abs(g * w),
        scores.signed_taylor: g * w,
        scores.fisher: g * g * w * w / 2,
        scores.hessian: h * w * w / 2,
    }
    for score, value in expected.items():
        np.testing.assert_allclose(scores.evaluate(score, w, context), value, rtol=1e-6)
    assert scores.random(w, context).shape == w.shape


def test_the_hessian_score_is_the_change_of_a_quadratic_loss(rng):
    """At a minimum, for a diagonal Hessian, cutting one weight costs exactly its score."""
    w, h = (jnp.asarray(rng.uniform(0.5, 2, size=5), jnp.float32) for _ in range(2))
    score = scores.hessian(w, jc.Context(stats=types.SimpleNamespace(hessian_diagonal=h)))
    for i in range(5):
        change = w.at[i].set(0) - w
        np.testing.assert_allclose(score[i], 0.5 * jnp.sum(h * change**2), rtol=1e-6)


def test_any_score_makes_masks():
    params = {"w": jnp.array([1.0, -4.0, 2.0, -3.0])}
    grads = {"w": jnp.array([9.0, 0.1, 3.0, 1.0])}
    plan = jc.plan(params, [("w", ByScore(sparsity=0.5, score=scores.taylor))])
    assert jc.compress(params, plan, grads=grads)["w"].mask.tolist() == [True, False, True, False]
    small = jax.jit(lambda s: ByScore(sparsity=s, score=lambda w, _: -w)(params["w"]).materialize())(0.75)
    assert small.tolist() == [0.0, -4.0, 0.0, 0.0]


def test_magnitude_and_random_are_fixed_scores():
    magnitude, random = jc.prune.Magnitude(0.5), jc.prune.Random(0.5, "global")
    assert (repr(magnitude), repr(random)) == ("Magnitude(sparsity=0.5)", "Random(sparsity=0.5, scope='global')")
    assert (magnitude.needs, random.needs, random.joint) == ((), ("key",), True)
    assert magnitude == jc.prune.Magnitude(sparsity=0.5) != ByScore(sparsity=0.5)
    assert hash(magnitude) == hash(jc.prune.Magnitude(sparsity=0.5))
    with pytest.raises(TypeError, match="score"):
        jc.prune.Magnitude(sparsity=0.5, score=scores.squared)


def test_what_a_score_reads_and_does_not_find_is_named():
    with pytest.raises(ValueError, match=r"layer/kernel: the score 'taylor' needs 'grad', .* pass grads="):
        scores.evaluate(scores.taylor, jnp.ones(2), jc.Context(path="layer/kernel"))
    with pytest.raises(ValueError, match=r"'stats.hessian_diagonal', which is missing; pass stats=jc.calibrate"):
        scores.evaluate(scores.hessian, jnp.ones(2), jc.Context(stats=types.SimpleNamespace()))
    with pytest.raises(ValueError, match=r"'random' needs 'key'.* pass key="):
        jc.prune.Random(sparsity=0.5)(jnp.ones(4))
    params = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"w: ByScore needs 'grad'"):
        jc.compress(params, jc.plan(params, [("w", ByScore(sparsity=0.5, score=scores.taylor))]))
