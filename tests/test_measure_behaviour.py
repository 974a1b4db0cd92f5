"""Agreement, robustness, energy and coded sizes in the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import jcompress as jc
from jcompress import measure

W = {"w": jax.random.normal(jax.random.key(0), (64, 32)), "b": jnp.zeros(32)}


def test_agreement_by_hand():
    dense = jnp.array([[[1.0, 2.0], [3.0, 0.0]], [[0.0, jnp.nan], [5.0, 6.0]]])
    other = jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[0.0, jnp.nan], [5.0, 6.05]]])
    assert float(measure.agreement(other, dense, "strict")) == 0.5
    assert float(measure.agreement(other, dense, "argmax")) == 0.75
    assert float(measure.agreement(other, dense, "epsilon", 0.1)) == 0.5  # NaN is within nothing
    assert float(measure.agreement(dense[:0], dense[:0])) == 1.0
    assert float(jax.jit(measure.agreement)(dense, dense)) == 1.0


@pytest.mark.parametrize("options", [{"how": "close"}, {"how": "epsilon", "epsilon": -1.0}])
def test_agreement_refuses(options):
    with pytest.raises(ValueError, match="agreement: found how="):
        measure.agreement(jnp.ones((2, 3)), jnp.ones((2, 3)), **options)
    with pytest.raises(ValueError, match=r"found shapes \(2, 3\) and \(3, 2\)"):
        measure.agreement(jnp.ones((2, 3)), jnp.ones((3, 2)))


def test_shifts_are_those_of_scipy():
    x = jax.random.normal(jax.random.key(1), (2, 6, 5, 3))
    for seed in range(6):
        key = jax.random.key(seed)
        by = np.asarray(jax.random.randint(key, (2,), -2, 3))
        expected = scipy.ndimage.shift(np.asarray(x), (0, *by, 0), order=0)
        np.testing.assert_array_equal(measure.shift(x, 2, key), expected)


def test_noise_has_its_deviation_and_networks_meet_the_same():
    x = {"image": jnp.ones((100, 50)), "label": jnp.arange(3)}
    key, seen = jax.random.key(2), []
    for _ in range(2):
        measure.robustness(lambda y: seen.append(y) or 0.0, x, measure.add_noise, [0.0, 0.5], key=key, repeats=2)
    assert len(seen) == 8
    np.testing.assert_array_equal(seen[0]["image"], x["image"])
    assert float(seen[2]["image"].std()) == pytest.approx(0.5, rel=0.05)
    np.testing.assert_array_equal(seen[3]["image"], seen[7]["image"])
    assert bool((seen[2]["image"] != seen[3]["image"]).any())
    np.testing.assert_array_equal(seen[2]["label"], x["label"])


def test_energy_by_hand():
    assert measure.energy(1000, 0, 0) == pytest.approx(4600e-12)
    assert measure.energy(0, 4, 0) == pytest.approx(640e-12)
    assert measure.energy(0, 0, 4) == pytest.approx(5e-12)
    assert measure.energy(1000, 0, 0, weight_bits=4, activation_bits=8, floats=False) == pytest.approx(200e-12)
    with pytest.raises(ValueError, match="energy: found -1 multiply-adds"):
        measure.energy(-1, 0, 0)


def test_the_report_says_what_the_coded_file_takes(tmp_path):
    small = jc.compress(W, jc.plan(W, [("w", jc.quantize.Int(bits=5)), ("b", None)]))
    cost = jc.trace.cost(lambda p, x: x @ p["w"] + p["b"], W, jnp.ones((3, 64)))
    found = jc.report(W, small, cost=cost, coded=True)
    jc.save(tmp_path / "x", small, coded=True)
    assert found.total.coded_bytes == jc.io.inspect(tmp_path / "x")["payload_bytes"] == jc.nbits(small, coded=True) / 8
    assert found.total.coded_bytes < found.total.stored_bytes
    row = next(row for row in found.rows if row.path == "w")
    assert row.coded_bits_per_weight < row.bits_per_weight
    assert row.bit_operations == 3 * 64 * 32 * 5 * 32
    assert "coded" in str(found).splitlines()[0]
    assert "coded" not in str(jc.report(W, small))
    assert jc.report(W, small).rows[0].coded_bits_per_weight is None
