"""The zoo itself: models run, every leaf is random, and what is said about widths is true."""

import functools

import jax
import numpy as np
import pytest
from zoo import ZOO, built

import jcompress as jc

NAMES = [entry.name for entry in ZOO]


@functools.cache
def jitted(name):
    return jax.jit(built(name).fn)


@pytest.mark.parametrize("name", NAMES)
def test_runs_at_any_batch(name):
    model = built(name)
    for batch in (2, 3):
        out = jitted(name)(model.params, *model.args(batch, jax.random.key(batch)))
        logits = jax.tree.leaves(out)[0]
        assert logits.shape[0] == batch
        assert np.std(logits) > 1e-2
        assert all(np.all(np.isfinite(x)) and np.max(np.abs(x)) < 100 for x in jax.tree.leaves(out))


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_is_random(name):
    for path, leaf in jc.paths(built(name).params):
        assert np.unique(leaf).size >= leaf.size - 1, path  # a thousand draws of float32 may collide once
        assert np.all(np.abs(leaf) > 0), path


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_matters(name):
    model = built(name)
    leaves, structure = jax.tree.flatten(model.params)
    inputs = [model.args(2, jax.random.key(seed)) for seed in range(4)]  # so that each branch is taken
    before = [jitted(name)(model.params, *args) for args in inputs]
    for i, (path, leaf) in enumerate(jc.paths(model.params)):
        moved = structure.unflatten([*leaves[:i], leaf[..., ::-1] * 2, *leaves[i + 1 :]])
        after = [jitted(name)(moved, *args) for args in inputs]
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        seen = any(np.max(np.abs(a - b)) > 1e-4 for a, b in pairs)
        assert seen != path.endswith("key/bias"), path  # a softmax does not see what all of its logits share


@pytest.mark.parametrize("name", NAMES)
def test_widths_and_counts(name):
    model = built(name)
    leaves = dict(jc.paths(model.params))
    assert model.count(**model.sizes) == sum(leaf.size for leaf in leaves.values())
    assert set(model.widths) == set(model.sizes)
    assert set(model.optional) <= set(model.sizes)
    for width, (path, axis) in model.widths.items():
        assert leaves[path].shape[axis] % model.sizes[width] == 0 or leaves[path].shape[axis] > model.sizes[width]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_run_where_they_are_said_to(name):
    model = built(name)
    args = model.args(2, jax.random.key(2))
    gradient = jax.grad(lambda p: jax.tree.leaves(model.fn(p, *args))[0].sum())
    if model.reverse:
        shapes = jax.eval_shape(gradient, model.params)
        assert jax.tree.map(jax.numpy.shape, shapes) == jax.tree.map(jax.numpy.shape, model.params)
    else:
        with pytest.raises(ValueError, match="Reverse-mode"):
            jax.eval_shape(gradient, model.params)
