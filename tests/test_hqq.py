"""Half-quadratic quantization against rounding, closed forms and planted zero points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.quantize import GPTQ, HQQ, Int, Stochastic, grids, hqq

GROUP = 32


def heavy_tailed(shape=(128, 16), freedom=3):
    return jnp.asarray(np.random.default_rng(0).standard_t(freedom, size=shape), jnp.float32)


def grouped(x, group=GROUP):
    """(groups, group, columns) of a (rows, columns) array."""
    return np.asarray(x, np.float64).reshape(-1, group, x.shape[-1])


def in_steps(w, node):
    """The weights over their scales, in groups."""
    return grouped(w) / np.asarray(node.scale, np.float64)[:, None]


def errors(w, node, norm):
    """The sum of powers of the errors in steps, for each group."""
    return (np.abs(in_steps(w, node) - in_steps(node.materialize(), node)) ** norm).sum(1)


@pytest.mark.parametrize("norm", [0.5, 1.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_error_is_never_above_affine_rounding(bits, norm):
    w = heavy_tailed()
    plain, fitted = Int(bits, GROUP, symmetric=False)(w), HQQ(bits, GROUP, norm=norm)(w)
    np.testing.assert_array_equal(plain.scale, fitted.scale)
    before, after = errors(w, plain, norm), errors(w, fitted, norm)
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < 0.99 * before).mean() > 0.3


def posed(w, bits):
    """What the zero point is solved for: the problem, the scales, and the zero points of the range."""
    grid = grids.Grid(bits, np.dtype("uint8"), 2.0**bits - 1, affine=True)
    problem = grids.pose(HQQ(bits, GROUP), w, jc.Context(), grid)
    ends = problem.full()
    scale, whole = grid.over(ends)
    return problem, scale, whole, -ends.low / scale


def test_when_all_is_shrunk_the_zero_point_is_that_of_least_squares():
    w = heavy_tailed()
    problem, scale, whole, _ = posed(w, 3)
    codes = grouped(Int(3, GROUP, symmetric=False)(w).codes)
    scaled = grouped(w) / np.asarray(scale, np.float64)[:, None]
    # |w / s - (q - z)|**2 is a regression on a constant.
    z = [np.linalg.lstsq(np.ones((GROUP, 1)), difference, rcond=None)[0][0] for difference in codes - scaled]
    found = hqq._zero(problem, scale, whole, whole, norm=1.0, beta=1e-6, kappa=1.0, steps=1)
    taken = np.asarray(found != whole)
    assert taken.mean() > 0.5
    np.testing.assert_allclose(np.asarray(found)[taken], np.array(z)[taken], atol=2**-8)


def test_without_shrinkage_the_zero_points_stay():
    problem, scale, whole, start = posed(heavy_tailed(), 3)
    found = np.asarray(hqq._zero(problem, scale, whole, start, norm=0.7, beta=1e9, kappa=1.0, steps=20))
    start = np.asarray(start).astype(np.float16)
    assert ((found == whole) | (found == start)).all()


def planted():
    """Weights on affine grids of 4 bits whose zero points are eighths, no halves among them."""
    rng = np.random.default_rng(1)
    codes = rng.integers(1, 15, size=(4, GROUP, 16))
    codes[:, 0], codes[:, 1] = 0, 15
    zero = rng.integers(2, 14, size=(4, 16)) + rng.choice([-3, -2, -1, 1, 2, 3], size=(4, 16)) / 8
    w = 0.25 * (codes - zero[:, None])
    return w, codes.reshape(-1, 16), zero


def test_planted_zero_points_are_found_from_whole_ones():
    w, _, zero = planted()
    problem, scale, whole, _ = posed(jnp.asarray(w.reshape(-1, 16), jnp.float32), 4)
    assert (np.asarray(whole) != zero).all()
    found = hqq._zero(problem, scale, whole, whole, norm=0.7, beta=10.0, kappa=1.01, steps=20)
    np.testing.assert_array_equal(found, zero)


def test_planted_zero_points_are_kept_although_some_weights_lie_elsewhere():
    w, codes, zero = planted()
    w[:, 2:6] += 0.25 * 0.375
    node = HQQ(4, GROUP)(jnp.asarray(w.reshape(-1, 16), jnp.float32))
    np.testing.assert_array_equal(node.zero.materialize(), zero)
    np.testing.assert_array_equal(node.codes, codes)


def test_codes_are_the_nearest_at_fractional_zero_points():
    w = heavy_tailed()
    node = HQQ(3, GROUP)(w)
    levels = np.arange(8)[:, None, None, None] - np.asarray(node.zero.materialize(), np.float64)[:, None]
    distance = np.abs(levels - in_steps(w, node))
    chosen = np.take_along_axis(distance, grouped(node.codes).astype(int)[None], 0)[0]
    np.testing.assert_allclose(chosen, distance.min(0), atol=1e-5)
    np.testing.assert_array_equal(node.encode(w).codes, node.codes)


def test_it_scales_with_the_weights():
    w = heavy_tailed()
    one, other = HQQ(3, GROUP)(w), HQQ(3, GROUP)(2**-7 * w)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.zero.materialize(), other.zero.materialize())


def test_hidden_weights_do_not_count():
    w = heavy_tailed((64, 8))
    where = jnp.arange(64)[:, None] < 40
    shown = HQQ(3)(w, jc.Context(where=where))
    np.testing.assert_array_equal(shown.zero.materialize(), HQQ(3)(w[:40]).zero.materialize())


def test_zero_points_are_held_and_stored_in_16_bits():
    node = HQQ(3, GROUP)(heavy_tailed())
    assert node.nbits() == 3 * 128 * 16 + (32 + 16) * 4 * 16
    train, _ = jc.split(node)
    assert [x.shape for x in jax.tree.leaves(train)] == [(4, 16)]


def test_execution_on_codes_equals_the_dense_product():
    w, x = heavy_tailed((32, 8)), heavy_tailed((4, 32))
    tree = {"w": HQQ(4)(w)}

    def fn(params, x):
        return x @ params["w"]

    dense = fn(jc.materialize(tree), x)
    np.testing.assert_allclose(jc.accelerate(fn)(tree, x), dense, rtol=1e-4, atol=1e-4)
    quantized = jc.quantize.activations(fn, tree, x)
    assert "int8" not in str(quantized.report())
    assert float(jnp.abs(quantized(tree, x) - dense).max()) < 0.05 * float(jnp.abs(dense).max())


def test_what_needs_whole_zero_points_refuses_them():
    w = heavy_tailed((32, 8))
    with pytest.raises(ValueError, match="whole zero points"):
        Stochastic(HQQ(4))(w, jc.Context(key=jax.random.key(0)))
    with pytest.raises(ValueError, match="whole zero points"):
        GPTQ(grid=HQQ(4))(w, jc.Context(stats=jc.trace.Stats(gram=jnp.eye(32), axes=(-2,))))
    with pytest.raises(ValueError, match="norm=2"):
        HQQ(norm=2)


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_more_than_eight_bits(bits, tmp_path):
    w = heavy_tailed()
    node, plain = HQQ(bits, group_size=GROUP)(w), Int(bits, group_size=GROUP, symmetric=False)(w)
    assert node.codes.dtype == jnp.uint16 and node.zero.dtype == jnp.float32
    error, least = (float(jnp.abs(x.materialize() - w).sum()) for x in (node, plain))
    assert error <= least < 4 * error
    jc.save(tmp_path / "x", {"w": node})
    np.testing.assert_array_equal(jc.load(tmp_path / "x")["w"].materialize(), node.materialize())
    assert jc.io.inspect(tmp_path / "x")["payload_bytes"] == -(-jc.nbits(node) // 8)
    assert jc.nbits(node) == w.size * bits + 2 * 32 * plain.scale.size
