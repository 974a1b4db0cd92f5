"""What every quantizer must pass, whatever its grid."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quantizers import ROWS, SHAPE, codes, context, fitted, quantizer, rounded, scales, values, weights
from test_conformance import classes_in

import jcompress as jc
from jcompress.formats.quantized import pool

F = jc.formats
each = pytest.mark.parametrize("name", ROWS)
Q = jc.quantize
CHOSEN_TOGETHER = {Q.E8P, Q.Trellis, Q.Dependent, Q.RateDistortion, Q.WaterFilling, Q.training.EntropyPenalized}
"""Quantizers whose codes are walks, points of a lattice, or paid for: no weight has a level of its own."""


def named(keep):
    return pytest.mark.parametrize("name", [name for name, row in ROWS.items() if keep(row)])


def dense(x):
    return np.asarray(jc.core.dense(x), np.float64)


def has_zero(row):
    return callable(row.levels) or row.levels is None or 0 in row.levels


def test_every_public_quantizer_has_its_row():
    listed = {method for row in ROWS.values() for method in classes_in(row.method)}
    public = {x for room in (jc.quantize, jc.quantize.training) for x in map(room.__dict__.get, room.__all__)}
    methods = {x for x in public if isinstance(x, type) and "context" in inspect.signature(x.__call__).parameters}
    assert methods - listed == CHOSEN_TOGETHER


@each
def test_values_lie_on_the_grid(name):
    node = codes(fitted(name))
    found, grid = dense(node), values(name, node)
    assert (np.abs(grid - found).min(0) <= 2e-6 * np.abs(grid).max(0)).all()


@each
def test_a_weight_gets_the_nearest_level_by_itself(name):
    """With the scales that the node has; so inside the range it moves by half a gap at most."""
    node, w = codes(fitted(name)), weights()
    found, grid = dense(rounded(node, w)), values(name, node)
    slack = 2e-6 * np.abs(grid).max(0)
    moved, best = np.abs(found - np.asarray(w)), np.abs(grid - np.asarray(w)).min(0)
    if not (ROWS[name].own and ROWS[name].gaps == 1):  # those round by rules of their own
        assert (moved <= best + slack).all()
    if ROWS[name].own:
        np.testing.assert_allclose(found, dense(fitted(name)), rtol=1e-6, atol=1e-7)


@named(lambda row: row.gaps is not None)
def test_the_error_inside_the_range_is_bounded_by_the_gap(name):
    node, w = codes(fitted(name)), np.asarray(weights(), np.float64)
    grid = values(name, node)
    inside = (w >= grid[0]) & (w <= grid[-1])
    below = np.where(grid <= w, grid, -np.inf).max(0)
    above = np.where(grid >= w, grid, np.inf).min(0)
    error = np.abs(dense(fitted(name)) - w)
    assert inside.mean() > 0.3
    assert (error <= ROWS[name].gaps * (above - below) + 1e-5 * np.abs(grid).max(0))[inside].all()


@each
def test_rounding_again_changes_nothing(name):
    node = codes(fitted(name))
    once = rounded(node, weights())
    np.testing.assert_allclose(rounded(node, once), once, rtol=1e-6, atol=0)
    if ROWS[name].again:
        given = fitted(name).materialize()
        known = {"previous": fitted(name)} if name == "inq" else {}
        again = jc.core.dense(quantizer(name)(given, **known))
        np.testing.assert_allclose(again, given, rtol=1e-5, atol=1e-5 * float(jnp.abs(given).max()))


@each
def test_rounding_is_monotone(name):
    """Among weights that share a scale."""
    node, w = codes(fitted(name)), weights()
    size = getattr(node, "group_size", None) or SHAPE[0]
    ordered = jnp.sort(w.reshape(-1, size, SHAPE[1]), axis=1).reshape(SHAPE)
    found = [rounded(node, ordered)]
    if ROWS[name].own:
        found.append(quantizer(name)(ordered).materialize())
    for x in found:
        assert (np.diff(np.asarray(x).reshape(-1, size, SHAPE[1]), axis=1) >= 0).all()


@named(has_zero)
def test_zero_is_exact(name):
    node = codes(fitted(name))
    fractions = isinstance(getattr(node, "zero", None), F.Frozen)
    if not fractions:
        assert not rounded(node, jnp.zeros(SHAPE)).any()
    assert not jc.core.dense(quantizer(name)(jnp.zeros(SHAPE))).any()
    if ROWS[name].own and not fractions:
        assert not quantizer(name)(weights().at[3].set(0.0)).materialize()[3].any()


@each
def test_bits_are_counted_and_stored(name, tmp_path):
    row, node = ROWS[name], jc.finalize(codes(fitted(name)))
    assert node.nbits() == row.bits * math.prod(SHAPE) + row.scale_bits
    jc.save(tmp_path / "w", {"w": node})
    again = jc.load(tmp_path / "w")["w"]
    assert jax.tree.structure(again) == jax.tree.structure(node)
    np.testing.assert_array_equal(again.materialize(), node.materialize())


@each
def test_bfloat16_is_rounded_as_its_value(name):
    w = weights().astype(jnp.bfloat16)
    node, wide = quantizer(name)(w), quantizer(name)(w.astype(jnp.float32))
    assert node.materialize().dtype == jnp.bfloat16
    if not ROWS[name].own or name == "ttq":  # what is not codes is computed in the dtype of the weights
        moved = [jnp.square(x.materialize().astype(jnp.float32) - w.astype(jnp.float32)).sum() for x in (node, wide)]
        assert float(moved[0]) <= 1.05 * float(moved[1])
    else:
        np.testing.assert_array_equal(node.materialize(), wide.materialize().astype(jnp.bfloat16))


@each
def test_products_of_integers_equal_simulated_ones(name):
    """And both, the product of what the codes stand for: the activation's and the weight's."""
    node, x = fitted(name), weights((5, SHAPE[0]), 1)
    node = jc.finalize(codes(node) if name == "lqer" else node)  # between its factors there is an activation more
    exact, simulated = (
        jc.quantize.activations(lambda w, x: x @ w, node, x, mode=mode, weight_bits=None)(node, x)
        for mode in ("integer", "simulate")
    )
    np.testing.assert_array_max_ulp(np.asarray(exact), np.asarray(simulated), 1)
    step = np.abs(x).max() / np.float32(127)
    product = np.round(np.asarray(x) / step) * np.float64(step) @ dense(node)
    np.testing.assert_allclose(exact, product, rtol=1e-4, atol=1e-5 * np.abs(product).max())


@each
def test_the_gradient_of_a_scale_is_the_sum_over_what_it_scales(name):
    node = codes(fitted(name))
    train, held = jc.split(node)
    if not isinstance(node, F.Quantized | F.Squeezed) or not isinstance(train.scale, jax.Array):
        pytest.skip("no scale is trained, or it has a rule of its own")
    g = weights(seed=2)
    found = jax.grad(lambda t: (g * jc.merge(t, held).materialize()).sum())(train).scale
    level = dense(node) / scales(node)
    want = pool(jnp.asarray(np.asarray(g) * level, jnp.float32), node.axes, node.group_size, jnp.add, 0.0)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@each
@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=["outputs", "inputs"])
def test_sharded_weights_get_the_same_values(name, spec):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(weights(), NamedSharding(mesh, spec))
    found = jax.jit(lambda w: ROWS[name].method(w, context()).materialize())(placed)
    np.testing.assert_allclose(found, fitted(name).materialize(), rtol=2e-5, atol=2e-5)


# Gradients of activations, region by region; those of weights, LSQ, DSQ, DoReFa, TTQ and PACT are beside their methods.


def test_signs_pass_gradients_up_to_one_in_magnitude():
    x, g = 1.5 * weights((50, 6)), weights((50, 6), 1)
    x = x.at[0, :3].set(jnp.array([1.0, -1.0, 0.0]))
    value, pull = jax.vjp(jc.quantize.training.sign_ste, x)
    passed = np.where(np.abs(x) <= 1, g, 0)
    np.testing.assert_array_equal(value, np.where(np.asarray(x) >= 0, 1, -1))
    np.testing.assert_array_equal(pull(g)[0], passed)
    found = jax.vjp(jc.quantize.training.scaled_sign, x)[1](g)[0]
    scale, total = np.abs(x).mean(1, keepdims=True), (np.asarray(g) * value).sum(1, keepdims=True)
    np.testing.assert_allclose(
        found, scale * passed + np.where(np.asarray(x) >= 0, 1, -1) * total / 6, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_learned_steps_with_an_offset_have_the_gradients_of_three_regions(bits):
    x, g = 2 * weights((300,)), weights((300,), 1)
    step, offset, most = 0.37, -0.5, 2**bits - 1
    pull = jax.vjp(lambda *a: jc.quantize.training.lsq_plus(*a, bits=bits), x, jnp.float32(step), jnp.float32(offset))[
        1
    ]
    u, g = (np.asarray(x, np.float64) - offset) / step, np.asarray(g, np.float64)
    inside, above = (u > 0) & (u < most), u >= most
    assert inside.any() and above.any() and (u <= 0).any()
    factor = (300 * most) ** -0.5
    to_x, to_step, to_offset = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(to_x, np.where(inside, g, 0), rtol=1e-6)
    slope = np.where(inside, np.round(u) - u, np.where(above, most, 0))
    np.testing.assert_allclose(to_step, factor * (g * slope).sum(), rtol=1e-3)
    np.testing.assert_allclose(to_offset, factor * g[~inside].sum(), rtol=1e-3)
