"""What holds of every loss between a student and a teacher."""

import jax
import jax.numpy as jnp
import losses
import numpy as np
import pytest

ORDER = np.random.default_rng(0).permutation(6)
ROWS = pytest.mark.parametrize("row", losses.ROWS.values(), ids=losses.ROWS.keys())


@ROWS
def test_the_same_under_jit_and_for_any_order_of_the_batch(row):
    value, compiled = row.loss(row.student, row.teacher), jax.jit(row.loss)
    assert value.shape == () and value.dtype == jnp.float32 and np.isfinite(value)
    np.testing.assert_allclose(compiled(row.student, row.teacher), value, rtol=1e-5)
    if not row.ordered:
        s, t = jax.tree.map(lambda x: x[ORDER], (row.student, row.teacher))
        np.testing.assert_allclose(compiled(s, t), value, rtol=1e-5)


@ROWS
def test_gradients_reach_the_student_and_not_the_teacher(row):
    ours, theirs = jax.jit(jax.grad(row.loss, argnums=(0, 1)))(row.student, row.teacher)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours))
    assert any(x.any() for x in jax.tree.leaves(ours))
    assert not any(x.any() for x in jax.tree.leaves(theirs))


@ROWS
def test_the_least_where_the_student_equals_the_teacher(row):
    if not row.equal:
        return
    of = jax.jit(jax.value_and_grad(row.loss))
    least, ascent = of(row.teacher, row.teacher)
    if row.least is not None:
        np.testing.assert_allclose(least, row.least, atol=2e-6)
    assert least <= of(row.student, row.teacher)[0]
    assert row.corner or max(float(jnp.abs(x).max()) for x in jax.tree.leaves(ascent)) < 1e-4
    near = jax.tree.map(lambda s, t: t + 0.05 * s, row.student, row.teacher)
    assert least <= of(near, row.teacher)[0] + 1e-7


@ROWS
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e18])
def test_slopes_are_finite_where_all_examples_coincide(row, value):
    """Also where both coincide, and where squares would leave float32."""
    flat = jax.tree.map(lambda x: jnp.full_like(x, value), row.student)
    like = jax.tree.map(lambda x: jnp.full_like(x, value), row.teacher)
    of = jax.jit(jax.value_and_grad(row.loss))
    for teacher in (like, row.teacher):
        found, slopes = of(flat, teacher)
        if abs(value) < 1e9:
            assert np.isfinite(found)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))


@ROWS
def test_sixteen_bits(row):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (row.student, row.teacher))
    found, slopes = jax.jit(jax.value_and_grad(row.loss))(*half)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, row.loss(*rounded), rtol=1e-5, atol=1e-6)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(slopes))


@ROWS
def test_features_of_other_shapes_are_told(row):
    def without_one(x):
        return x[:-1]

    with pytest.raises(ValueError, match="found"):
        row.loss(jax.tree.map(without_one, row.student), row.teacher)
