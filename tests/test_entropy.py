"""Rates against SciPy's entropy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jcompress.numeric.entropy import code_lengths, rate


def test_rate_is_the_entropy_times_the_length():
    counts = np.random.default_rng(0).integers(0, 50, (3, 17))
    expected = [row.sum() * scipy.stats.entropy(row, base=2) for row in counts]
    np.testing.assert_allclose(rate(counts), expected, rtol=1e-5)


def test_rate_under_another_code_is_the_cross_entropy():
    counts, other = np.array([3, 0, 5]), np.array([1, 2, 1])
    assert rate(counts, other) == pytest.approx(3 * 2 + 5 * 2)
    assert np.isinf(rate([1, 1], [1, 0]))
    np.testing.assert_allclose(code_lengths([1, 1, 2, 0]), [2, 2, 1, np.inf])
    np.testing.assert_allclose(code_lengths([0, 2], floor=1.0), [2, np.log2(4 / 3)], rtol=1e-6)


def test_the_slope_of_the_rate_is_the_code_length():
    """Of d(sum n log N/n) / dn_i the terms of the normalization cancel."""
    counts = jnp.array([1.0, 2.0, 5.0, 0.0])
    slope = jax.grad(rate)(counts)
    np.testing.assert_allclose(slope[:3], code_lengths(counts)[:3], rtol=1e-5)
    assert np.isfinite(slope).all()
