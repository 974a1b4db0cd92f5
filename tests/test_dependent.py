"""Trellis-coded quantization: the machine against its closed form, Viterbi against brute force, bytes against rates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jcompress as jc
from jcompress.numeric import coding, dependent, models
from jcompress.numeric.entropy import code_lengths
from jcompress.numeric.grids import grid_of
from jcompress.quantize.dependent import chosen
from jcompress.quantize.water_filling import among_zeros, laplace_lengths

Dependent, Int = jc.quantize.Dependent, jc.quantize.Int
W = jax.random.laplace(jax.random.key(0), (60, 128))


@pytest.mark.parametrize("states", [4, 8])
def test_the_closed_form_is_the_machine(states):
    codes = np.random.default_rng(0).integers(-9, 10, (5, 33)).astype(np.int8)
    state, expected = np.zeros(5, int), []
    for column in codes.T:
        expected.append(state & 1)
        state = dependent.step(state, column & 1, states)
    np.testing.assert_array_equal(dependent.quantizers(codes, states), np.array(expected).T)
    np.testing.assert_array_equal(dependent.quantizers(jnp.asarray(codes), states), np.array(expected).T)


def test_four_states_are_those_of_the_standard():
    """Its table, states counted with the quantizer's bit first: 0 and 1 of quantizer 0, 2 and 3 of quantizer 1."""
    table = [[0, 2], [2, 0], [1, 3], [3, 1]]
    turned = np.array([0, 2, 1, 3])  # bits the other way round
    for state, odd in itertools.product(range(4), range(2)):
        assert turned[dependent.step(np.array(turned[state]), np.array(odd), 4)] == table[state][odd]


@pytest.mark.parametrize("states", [4, 8])
@pytest.mark.parametrize("price", [0.0, 0.3])
def test_the_path_is_the_best_of_all(states, price):
    """Every sequence of codes from -2 to 2, six numbers, against the one chosen at given code lengths."""
    x = 1.3 * jax.random.normal(jax.random.key(1), (3, 6))
    h = jax.random.uniform(jax.random.key(2), (3, 6), minval=0.5, maxval=2.0)
    got = np.asarray(chosen(x, h, None, price, 2, states, rounds=1))
    free = np.asarray(chosen(x, h, None, 0.0, 2, states, rounds=0))
    counts = np.zeros((2, 5))
    np.add.at(counts, (dependent.quantizers(free, states), free + 2), 1)
    lengths = np.asarray(code_lengths(counts, floor=0.01))
    every = np.array(list(itertools.product(range(-2, 3), repeat=6)), np.int32)
    quantizer = dependent.quantizers(every, states)
    levels = every - np.sign(every) * quantizer / 2
    for row, own, found in zip(np.asarray(x), np.asarray(h), got, strict=True):
        cost = (own * (row - levels) ** 2 + price * lengths[quantizer, every + 2]).sum(-1)
        at = np.flatnonzero((every == found).all(-1))[0]
        assert cost[at] == pytest.approx(cost.min(), rel=1e-5)


@pytest.mark.parametrize(("states", "less"), [(4, 0.97), (8, 0.965)])
def test_fewer_bytes_at_equal_error(states, less):
    """Against codes of one grid that pay for their bits too, along their curve of error and bits."""

    def measured(method):
        node = method(W)
        return float(jnp.log(((node.materialize() - W) ** 2).mean())), jc.nbits({"w": node}, coded=True)

    def grid(step):
        return Int(bits=6, axis=None, clip=jc.quantize.ranges.Fixed(None, 31 * step))

    errors, bits = zip(*(measured(jc.quantize.RateDistortion(0.1, grid(s))) for s in (0.6, 0.8, 1.0)), strict=True)
    error, found = measured(Dependent(0.1, grid(1.0), states))
    assert errors[0] < error < errors[-1]
    assert found < less * np.interp(error, errors, bits)


@pytest.mark.parametrize("shape", [(60, 128), (7, 9)])
@pytest.mark.parametrize("hidden", [False, True])
def test_codes_of_a_trellis_come_back(shape, hidden):
    rng = np.random.default_rng(3)
    codes = np.asarray(
        Dependent(0.1)(jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1))))).codes
    )
    where = rng.random(shape) < 0.4 if hidden else None
    flat = codes if where is None else np.where(where, codes, 0)[where]
    grid = grid_of(shape, where, 8)
    stream = coding.encode(flat, 8, grid)
    again, used = coding.decode(memoryview(stream), flat.size, 8, codes.dtype, grid)
    assert used == len(stream)
    np.testing.assert_array_equal(again.reshape(flat.shape), flat)
    if shape == (60, 128) and not hidden:
        assert stream[0] >> 5 == models.STATE
        assert len(stream) < len(coding.encode(flat, 8, grid_of(shape)))


@pytest.mark.parametrize("method", [Dependent(0.1), jc.chain(jc.prune.Magnitude(0.8), Dependent(0.1))])
def test_files_are_exact_and_as_long_as_they_say(tmp_path, method):
    tree = jc.compress({"w": W}, jc.plan({"w": W}, [("w", method)]))
    for coded in (False, True):
        size = jc.save(tmp_path / "w.jc", tree, coded=coded)
        again = jc.load(tmp_path / "w.jc")
        np.testing.assert_array_equal(again["w"].materialize(), tree["w"].materialize())
        assert 0 <= size - jc.nbits(tree, coded=coded) / 8 < 400


# Steps by how much each input matters.


def test_water_filling_against_one_step_for_all_inputs():
    """Correlated inputs of unlike size: bits at the error of outputs that GPTQ's codes give, both coded."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = {"w": jax.random.normal(keys[0], (64, 96))}
    mix = jax.random.normal(keys[1], (64, 64)) * jnp.exp(-jnp.arange(64) / 16)
    x = jax.random.normal(keys[2], (600, 64)) @ mix.T
    plan = jc.plan(w, [("w", jc.quantize.WaterFilling())])
    stats = jc.calibrate(lambda p, x: x @ p["w"], w, [x], plan=plan)

    def measured(method):
        small = jc.compress(w, jc.plan(w, [("w", method)]), stats=stats)
        change = x @ (jc.materialize(small)["w"] - w["w"])
        return float(jnp.log2((change**2).mean()) / 2), jc.nbits(small, coded=True) / 64 / 96

    error, bits = measured(jc.quantize.GPTQ(bits=4, order=True))
    step = {states: measured(jc.quantize.WaterFilling(0.3, states=states)) for states in (0, 8)}
    for own, found in step.values():
        assert found + (own - error) < bits - 0.3  # an octave of error is a bit
    assert sum(step[8]) < sum(step[0])


@pytest.mark.parametrize("states", [0, 4])
def test_water_filling_leaves_a_pruned_network_pruned(states):
    w, x = W * (jnp.abs(W) > jnp.median(jnp.abs(W))), jax.random.normal(jax.random.key(1), (300, W.shape[0]))
    method = jc.quantize.WaterFilling(0.3, 0.0, states)
    plan = jc.plan({"w": w}, [("w", method)])
    stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x @ jnp.triu(jnp.ones((len(W),) * 2))], plan=plan)
    found = jc.compress({"w": w}, plan, stats=stats)["w"].materialize()
    np.testing.assert_array_equal(found == 0, (w == 0) | (found == 0))
    assert float((found != 0).mean()) > 0.2


@pytest.mark.parametrize("states", [0, 4])
def test_rows_of_a_table_are_inputs_whose_gram_matrix_is_their_counts(states):
    counts = 1 + jnp.arange(len(W)) ** 2 % 23
    known = {"gram": jnp.diag(counts.astype(jnp.float32)), "counts": counts}
    context = jc.Context(stats=jc.trace.Stats(**known, axes=(-2,)))
    want, found = (
        jc.quantize.WaterFilling(0.7, states=states, weigh=weigh)(W, context) for weigh in ("gram", "counts")
    )
    np.testing.assert_allclose(found.scale.astype(jnp.float32), want.scale.astype(jnp.float32), rtol=1e-6)
    np.testing.assert_array_equal(found.codes, want.codes)
    never = jc.Context(stats=jc.trace.Stats(counts=jnp.zeros(len(W), jnp.uint32), axes=(-2,)))
    assert jnp.isfinite(jc.quantize.WaterFilling(weigh="counts")(W, never).materialize()).all()


def test_words_that_are_read_often_get_the_bits():
    """Of two thousand words read as Zipf's law has it: little more than half the error, read by read, in like bits."""
    rng, often = np.random.default_rng(0), 1 / np.arange(1, 2001)
    params = {"words": jnp.asarray(rng.normal(size=(2000, 32)), jnp.float32), "out": jnp.ones((32, 4))}
    fn = lambda params, ids: params["words"][ids] @ params["out"]  # noqa: E731
    *batches, last = (rng.choice(2000, (64, 32), p=often / often.sum()) for _ in range(9))
    plan = jc.plan(params, [("words", jc.quantize.WaterFilling(1.0, weigh="counts", damping=0.1)), (".*", None)])
    found = jc.compress(params, plan, stats=jc.calibrate(fn, params, batches, plan))["words"]
    even = Dependent(0.1, jc.quantize.Int(3, axis=None), states=4)(params["words"])
    (bits, error), (others, theirs) = (
        (jc.nbits(node, coded=True), float(jnp.square((node.materialize() - params["words"])[last]).mean()))
        for node in (found, even)
    )
    assert bits < 1.1 * others and error < 0.6 * theirs


@pytest.mark.parametrize("width", [4, 9])
def test_a_table_that_is_the_last_layer_too_is_refused(width):
    """Also where it is square, and its counts would fit the other axis."""
    params = {"words": jnp.ones((9, width))}
    fn = lambda params, ids: jnp.tanh(params["words"][ids]) @ params["words"].T  # noqa: E731
    plan = jc.plan(params, [("words", jc.quantize.WaterFilling(weigh="counts"))])
    stats = jc.calibrate(fn, params, [np.arange(9)], plan)
    with pytest.raises(ValueError, match="words: found a table that is multiplied too"):
        jc.compress(params, plan, stats=stats)


def test_lengths_are_those_of_the_cells():
    density, scale = scipy.stats.laplace(scale=0.8), jnp.float32(0.8)
    lengths = np.asarray(laplace_lengths(scale, 3, 2))
    edges = {0: [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], 1: [-3, -2, -1, -0.25, 0.25, 1, 2, 3]}
    for quantizer, at in edges.items():
        np.testing.assert_allclose(lengths[quantizer], -np.log2(np.diff(density.cdf(at))), rtol=1e-4)


def test_lengths_among_zeros_are_those_of_the_mixture():
    """Of a hundred codes five come from the density; all the rest are zeros."""
    lengths = laplace_lengths(jnp.float32(0.8), 3, 2)
    found, alone = (np.exp2(-np.asarray(x, np.float64)) for x in (among_zeros(lengths, jnp.float32(0.05), 3), lengths))
    zeros = np.arange(-3, 4) == 0
    np.testing.assert_allclose(found, 0.95 * zeros + 0.05 * alone, rtol=1e-4)
    np.testing.assert_allclose(among_zeros(lengths, jnp.float32(1), 3), lengths, rtol=1e-5)


@pytest.mark.parametrize("options", [{"step": -1.0}, {"states": 3}, {"bits": 1}, {"weigh": "norm"}])
def test_bad_settings_of_water_filling(options):
    with pytest.raises(ValueError, match="WaterFilling: "):
        jc.quantize.WaterFilling(**options)


@pytest.mark.parametrize(
    "make", [lambda: Dependent(-1.0), lambda: Dependent(states=5), lambda: Dependent(0.1, Int(4, symmetric=False))]
)
def test_bad_settings(make):
    with pytest.raises(ValueError, match="Dependent: "):
        make()


def test_a_trellis_of_other_states_is_refused():
    with pytest.raises(ValueError, match="states=5"):
        jc.formats.DependentCodes(jnp.zeros((1, 4), jnp.int8), jnp.ones((1, 1)), states=5).materialize()
