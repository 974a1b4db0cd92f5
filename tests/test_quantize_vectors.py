"""Codes of vectors without a codebook: the lattice E8 and trellises."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.numeric import lattice, trellis

E8P, Trellis, Rotation = jc.quantize.E8P, jc.quantize.Trellis, jc.quantize.Rotation


def drawn(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_the_words_are_distinct_points_of_the_lattice():
    table = lattice.magnitudes()
    lengths = np.square(table).sum(1)
    assert len(np.unique(table, axis=0)) == 256
    assert (lengths <= 10).sum() == 227
    assert lengths.max() == 12
    points = np.asarray(lattice.decode(jnp.arange(1 << 16).astype(jnp.uint16)))
    assert len(np.unique(points, axis=0)) == 1 << 16
    doubled = 2 * (points - 0.25)
    np.testing.assert_array_equal(doubled, np.round(doubled))
    assert ((doubled % 2 == doubled[:, :1] % 2).all(1)).all()  # all integers, or all halves of odd ones
    assert (doubled.sum(1) / 2 % 2 == 0).all()


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_the_nearest_word_is_that_of_all_words(rng, size):
    x = size * drawn(rng, 40, 8)
    points = np.asarray(lattice.decode(jnp.arange(1 << 16).astype(jnp.uint16)), np.float64)
    best = [np.square(points - row).sum(1).min() for row in np.asarray(x, np.float64)]
    found = np.square(np.asarray(lattice.decode(lattice.encode(x)), np.float64) - np.asarray(x, np.float64)).sum(1)
    np.testing.assert_allclose(found, best, rtol=1e-5)


def test_gaussian_weights_in_e8(rng):
    w = drawn(rng, 512, 64)
    node = E8P()(w)
    error = float(jnp.mean(jnp.square(node.materialize() - w)))
    assert 0.088 < error < 0.095  # four values have 0.1175, and no code of 2 bits less than 0.0625
    assert node.nbits() == 2 * w.size + 32 * 64


@pytest.mark.parametrize(("code", "multiplier", "increment"), [("1mad", 34038481, 76625530)])
def test_what_a_state_stands_for(code, multiplier, increment):
    for state in (0, 1, 77, 65535):
        x = (state * multiplier + increment) % 2**32
        total = sum((x >> (8 * i)) % 256 for i in range(4))
        np.testing.assert_allclose(trellis.value(jnp.int32(state), code), (total - 510) / 147.8, rtol=1e-6)


def test_what_a_state_stands_for_in_half_precision():
    for state in (0, 1, 77, 65535):
        x = (state * 89226354 + 64248484) % 2**32
        x = (x & 0x8FFF8FFF) ^ 0x3B603B60
        halves = np.array([x & 0xFFFF, x >> 16], np.uint16).view(np.float16).astype(np.float64)
        np.testing.assert_allclose(trellis.value(jnp.int32(state), "3inst"), halves.sum() / 1.24, rtol=1e-6)


@pytest.mark.parametrize("code", ["1mad", "3inst"])
def test_states_are_about_gaussian(code):
    values = np.asarray(trellis.value(jnp.arange(1 << 16), code), np.float64)
    moments = [(values**power).mean() for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.35)
    np.testing.assert_allclose(moments[:2], [0, 1], atol=0.01)


@pytest.mark.parametrize(("bits", "memory", "length"), [(1, 4, 8), (2, 4, 5), (2, 5, 4)])
def test_the_walk_is_the_nearest_of_all(rng, bits, memory, length):
    x = np.asarray(rng.normal(size=length), np.float32)
    every = np.array(list(itertools.product(range(1 << bits), repeat=length)))
    numbers = np.asarray(trellis.decode(jnp.asarray(every), bits, memory, "3inst"))
    costs = np.square(numbers - x).sum(1)
    levels, seams = trellis.value(jnp.arange(1 << memory), "3inst"), 1 << (memory - bits)
    found = []
    for seam in range(seams):  # each closed walk has one of these seams
        held = jnp.where(jnp.arange(seams) == seam, 0.0, jnp.inf)
        states = trellis.walk(jnp.asarray(x), levels, bits, held)
        symbols = states & ((1 << bits) - 1)
        own = np.asarray(trellis.decode(symbols, bits, memory, "3inst"))
        np.testing.assert_array_equal(own, levels[states])  # it closes
        found.append(np.square(own - x).sum())
    np.testing.assert_allclose(min(found), costs.min(), rtol=1e-5)
    codes = trellis.encode(jnp.asarray(x), bits, memory, "3inst")
    taken = np.square(np.asarray(trellis.decode(codes, bits, memory, "3inst")) - x).sum()
    assert costs.min() * (1 - 1e-5) <= taken <= max(found)


@pytest.mark.parametrize(("memory", "most"), [(8, 0.096), (12, 0.0755), (16, 0.071)])
def test_gaussian_weights_on_a_trellis(rng, memory, most):
    w = drawn(rng, 128, 16) if memory == 16 else drawn(rng, 128, 64)
    node = Trellis(memory=memory)(w)
    assert 0.06 < float(jnp.mean(jnp.square(node.materialize() - w))) < most
    assert node.nbits() == 2 * w.size + 32 * w.shape[1]


def test_one_and_three_bits_lie_near_the_bound(rng):
    w = drawn(rng, 64, 64)
    errors = [float(jnp.mean(jnp.square(Trellis(bits=b, memory=10)(w).materialize() - w))) for b in (1, 3)]
    for error, bits in zip(errors, (1, 3), strict=True):
        assert 0.25**bits < error < 1.5 * 0.25**bits


def problem(rng, k=32, n=32):
    x = rng.normal(size=(400, k)) @ (rng.normal(size=(k, k)) * np.exp(-np.arange(k) / 10)[:, None])
    gram = jnp.asarray(x.T @ x, jnp.float32)
    return drawn(rng, k, n), gram, jc.Context(stats=jc.trace.Stats(gram=gram, axes=(-2,)), path="w")


@pytest.mark.parametrize("make", [E8P, lambda weigh: Trellis(memory=8, block=(4, 16), weigh=weigh)])
def test_outputs_are_nearer_than_those_of_gptq_and_of_rounding(rng, make):
    w, gram, known = problem(rng)

    def error(method):
        change = method(w, known).materialize() - w
        return float(jnp.sum(change * (gram @ change)))

    weighed = error(Rotation(make(weigh="gram")))
    assert weighed < 0.5 * error(Rotation(make(weigh=None)))
    assert weighed < 0.8 * error(Rotation(jc.quantize.GPTQ(bits=2, symmetric=False, clip="mse")))


def test_scales_fit_the_outputs(rng):
    w, gram, known = problem(rng)
    node = E8P(weigh="gram", damping=0.0)(w, known)
    value = node.materialize()
    slope = jnp.sum(value * (gram @ (w - value)), axis=0)
    assert float(jnp.abs(slope).max()) < 1e-3 * float(jnp.sum(w * (gram @ w), axis=0).max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trellis(bits=9), "bits=9"),
        (lambda: Trellis(memory=20), "memory=20"),
        (lambda: Trellis(block=(1, 2)), r"block=\(1, 2\)"),
        (lambda: Trellis(code="table"), "code='table'"),
        (lambda: Trellis(block=(1, 64), weigh="gram"), "2 inputs or more"),
        (lambda: E8P(weigh="hessian"), "weigh='hessian'"),
        (lambda: E8P()(jnp.ones((12, 4)), jc.Context(path="a/w")), r"a/w: E8P found shape \(12, 4\)"),
        (lambda: Trellis()(jnp.ones((24, 40)), jc.Context(path="a/w")), r"use block=\(8, 8\)"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
