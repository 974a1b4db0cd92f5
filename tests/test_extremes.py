"""Numbers near the ends of float32: as good as at scale 1, or an error by path, never NaN without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import METHODS as ROWS
from rows import statistics

import jcompress as jc

Q = jc.quantize
METHODS = [
    jc.share.KMeans(4),
    jc.share.KMeans(4, scope="global"),
    jc.factorize.SVD(rank=3),
    jc.factorize.SVD(energy=0.9),
    jc.factorize.SVD(rank=3, randomized=True),
    Q.Int(1),
    Q.Int(8),
    Q.Int(4, symmetric=False),
    Q.Int(2, clip="mse"),
    Q.Int(4, axis=None, clip=Q.ranges.KL(128)),
    Q.HQQ(3, group_size=8),
    Q.Ternary(),
    Q.ABCNet(2),
    Q.NF4(8),
    jc.prune.Magnitude(0.5),
    Q.training.LSQ(3, axis=None, start="range"),
    Q.training.DSQ(3, axis=None),
]


def error(method, x, dtype=jnp.float32):
    params = {"w": jnp.asarray(x, jnp.float32).astype(dtype)}
    small = jc.compress(params, jc.plan(params, [("w", method)]), key=jax.random.key(0))
    w, found = (np.asarray(y["w"].astype(jnp.float32), np.float64) for y in (params, jc.materialize(small)))
    assert np.isfinite(found).all()
    return np.linalg.norm(w - found) / np.linalg.norm(w)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(
    ("scale", "dtype"), [(3e38, "float32"), (1e30, "float32"), (1e-30, "float32"), (3e38, "bfloat16")]
)
def test_the_relative_error_is_that_at_scale_one(method, scale, dtype, rng):
    x = rng.normal(size=(16, 8))
    x /= np.abs(x).max()
    assert error(method, scale * x, dtype) == pytest.approx(error(method, x, dtype), rel=0.02, abs=0.01)


@pytest.mark.parametrize("method", [Q.Int(4, power_of_two=True), Q.PowersOfTwo(3)], ids=repr)
def test_what_rounds_beyond_the_greatest_number_is_named(method):
    params = {"layer": {"kernel": jnp.full((4, 4), 3e38)}}
    with pytest.raises(ValueError, match=r"layer/kernel: found magnitudes up to 3e\+38.*divide the leaf"):
        jc.compress(params, jc.plan(params, [(".*", method)]))


# Grids and thresholds of their own size, whatever the array's.
ABSOLUTE = {"fixed-point", "float16", "soft-threshold", "by-mixture"}


def row_error(row, x):
    params = {"w": jnp.asarray(x, jnp.float32)}
    grads = {"w": jnp.asarray(np.random.default_rng(7).normal(size=row.shape), jnp.float32)}
    stats = {"w": statistics(row.shape)}
    plan = jc.plan(params, [("w", row.method)])
    small = jc.compress(params, plan, key=jax.random.key(0), stats=stats, grads=grads)
    w, found = (np.asarray(y["w"], np.float64) for y in (params, jc.materialize(small)))
    assert np.isfinite(found).all()
    return np.linalg.norm(w - found) / np.linalg.norm(w)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in ABSOLUTE], ids=lambda row: row.name)
@pytest.mark.parametrize("scale", [3e38, 1e30, 1e-30])
def test_every_row_is_as_good_as_at_scale_one_or_names_the_leaf(row, scale):
    x = np.random.default_rng(0).normal(size=row.shape)
    x /= np.abs(x).max()
    mantissa = np.frexp(scale)[0]  # grids of powers of two look alike a power of two away
    try:
        far = row_error(row, scale * x)
    except ValueError as refused:
        assert scale == 3e38 and str(refused).startswith("w: found magnitudes up to 3e+38"), refused
    else:
        assert far == pytest.approx(row_error(row, mantissa * x), rel=0.02, abs=0.01)


# Under jit nothing can be refused: these have no level between zero, or half, of such numbers and infinity.
NO_LEVEL = {"int1-affine", "int4-power-of-two", "powers-of-two", "powers-of-two-inq", "inq"}
# The cores of networks hold the norm of all entries, and products may pass the largest of them.
NETWORKS = ("nmf", "tucker", "block-term", "tensor-", "whitened-cp")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_odd_inputs_give_numbers_or_name_the_leaf(row):
    x = np.random.default_rng(0).normal(size=row.shape)
    x /= np.abs(x).max()
    odd = [1e-38 * x, 1e-42 * x, 0 * x, 0 * x + 1, np.broadcast_to(np.arange(row.shape[-1]), row.shape)]
    far = [] if row.name in NO_LEVEL or row.name.startswith(NETWORKS) else [3e38 * x]
    grads = {"w": jnp.asarray(np.random.default_rng(7).normal(size=row.shape), jnp.float32)}
    stats, key = {"w": statistics(row.shape)}, jax.random.key(0)
    plan = jc.plan(grads, [("w", row.method)])

    def run(params):
        return jc.materialize(jc.compress(params, plan, key=key, stats=stats, grads=grads))["w"]

    compiled = jax.jit(run) if row.jit else run
    for case in (*odd, *(far if row.jit else [])):
        assert np.isfinite(compiled({"w": jnp.asarray(case, jnp.float32)})).all()
    for case in odd[1:4]:
        assert np.isfinite(run({"w": jnp.asarray(case, jnp.float32)})).all()


@pytest.mark.parametrize("method", [Q.Int(4), Q.Int(8, axis=None), Q.Float8("e5m2"), Q.NF4(8)], ids=repr)
@pytest.mark.parametrize("scale", [3e38, 1.0, 1e-30])
def test_scales_are_refitted_next_to_the_greatest_number(method, scale, rng):
    x = rng.normal(size=(64, 8))
    x = jnp.asarray(x / np.abs(x).max(), jnp.float32)
    far = method(x * scale).project(x * scale).scale
    # Not divided by XLA, which multiplies by an inverse that is zero.
    np.testing.assert_allclose(np.asarray(far, np.float64) / scale, method(x).project(x).scale, rtol=2e-2)


P = jc.prune
MASKS = [
    P.ByScore(0.5, score=P.scores.squared),
    P.ByScore(0.5, scope="global", score=P.scores.squared),
    P.ByScore(0.5, score=P.scores.layer_adaptive),
    P.Fisher(0.5),
    P.OBD(0.5, scope="output"),
    P.Wanda(0.5),
    P.Magnitude(0.5, pattern=P.Block((4, 2))),
    P.Magnitude(0.5, scope="global", pattern=P.Block((None, 1))),
    P.Magnitude(pattern=P.Shared(P.NM(2, 4))),
    P.Sampled(0.5, score=P.scores.squared),
    P.AnnealedChannels(0.5, steps=10, at_least=2),
    P.OBS(0.5),
    P.SparseGPT(0.5),
]


@pytest.mark.parametrize("method", MASKS, ids=repr)
@pytest.mark.parametrize("exponent", [126, 100, -100])
def test_masks_are_those_at_scale_one(method, exponent, rng):
    dense = {name: jnp.asarray(rng.uniform(-1, 1, size=(16, 8)), jnp.float32) for name in "ab"}
    dense["b"] = dense["b"] * 1.5

    def compressed(scale):
        params = jax.tree.map(lambda x: x * 2.0**scale, dense)
        stats = {name: statistics((16, 8)) for name in params}
        plan = jc.plan(params, [(".*", method)])
        return jc.finalize(jax.jit(lambda p: jc.compress(p, plan, stats=stats, key=jax.random.key(0)))(params))

    at_one, far = compressed(0), compressed(exponent)
    for name in dense:
        np.testing.assert_array_equal(at_one[name].mask, far[name].mask)
        back = np.asarray(far[name].materialize(), np.float64) * 2.0**-exponent
        np.testing.assert_allclose(back, at_one[name].materialize(), rtol=1e-5, atol=1e-6)


def test_values_behind_gates_that_leave_the_range_are_named():
    params = {"w": jnp.full((2, 2), jnp.finfo("float16").max, "float16")}
    with pytest.raises(ValueError, match=r"w: found magnitudes up to 6.55e\+04.*divide the leaf"):
        jc.compress(params, jc.plan(params, [("w", P.HardConcrete(keep=0.5))]))


def test_the_search_of_scales_by_inputs_is_that_at_scale_one(rng):
    x = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    stats = statistics((16, 8))
    uneven = jnp.geomspace(1.0, 30.0, 16)
    stats = {"w": jc.trace.Stats(gram=uneven[:, None] * stats.gram * uneven, axes=stats.axes)}
    found = []
    for w in (x, x * 2.0**100):
        plan = jc.plan({"w": w}, [("w", Q.AWQ(Q.Int(3), points=9))])
        found.append(np.ravel(jax.tree.leaves(jc.compress({"w": w}, plan, stats=stats)["w"].scale)[0]))
    assert np.ptp(found[0]) > 0
    np.testing.assert_allclose(*found, rtol=1e-6)
