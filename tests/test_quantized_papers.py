"""Quantizers and estimators against their papers' formulas, computed in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.quantize import training


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Learned steps


@pytest.mark.parametrize("batch", [1, 64])
def test_a_learned_step_moves_as_far_in_a_larger_batch_of_the_same_examples(batch, rng):
    """The sum over examples of a mean loss stays, and so must the factor."""
    example, g = normal(rng, 5, 7), normal(rng, 5, 7)
    x, pulled = jnp.tile(example, (batch, 1, 1)), jnp.tile(g, (batch, 1, 1)) / batch
    _, pull = jax.vjp(lambda s: training.lsq(x, s, 3), jnp.float32(0.4))
    u = np.asarray(example) / 0.4
    slope = np.where((u > 0) & (u < 7), np.round(u) - u, np.clip(u, 0, 7))
    np.testing.assert_allclose(pull(pulled)[0], (g * slope).sum() / np.sqrt(35 * 7), rtol=1e-4)
    _, pull = jax.vjp(lambda s: training.lsq(x, s, 3, features=7), jnp.float32(0.4))
    np.testing.assert_allclose(pull(pulled)[0], (g * slope).sum() / np.sqrt(7 * 7), rtol=1e-4)
    _, pull = jax.vjp(lambda b: training.lsq_plus(x, jnp.float32(0.4), b, 3), jnp.float32(0.0))
    outside = np.where((u <= 0) | (u >= 7), g, 0).sum()
    np.testing.assert_allclose(pull(pulled)[0], outside / np.sqrt(35 * 7), rtol=1e-4)


# Binary networks


def test_xnor_weights_have_the_gradient_of_the_paper(rng):
    w, g = 1.5 * normal(rng, 6, 5), normal(rng, 6, 5)
    value, pull = jax.vjp(training.xnor, w)
    scale = np.abs(np.asarray(w)).mean(0)
    np.testing.assert_allclose(value, np.sign(w) * scale, rtol=1e-6)
    np.testing.assert_allclose(pull(g)[0], g * (1 / 6 + scale * (np.abs(np.asarray(w)) <= 1)), rtol=1e-5)
    np.testing.assert_allclose(value, jc.quantize.Int(bits=1)(w).materialize(), rtol=1e-6)
    np.testing.assert_allclose(training.xnor(w[:, 0]), np.sign(w[:, 0]) * scale[0], rtol=1e-6)


@pytest.mark.parametrize(("padding", "strides"), [("SAME", (1, 1)), ("VALID", (2, 1))])
def test_input_scales_are_the_mean_of_magnitudes_in_each_window(padding, strides, rng):
    x, window = normal(rng, 2, 7, 6, 3), (3, 3)
    found = np.asarray(training.xnor_input_scales(x, window, strides, padding))
    mean = np.abs(np.asarray(x, np.float64)).mean(-1)
    padded = np.pad(mean, ((0, 0), (1, 1), (1, 1))) if padding == "SAME" else mean
    rows, columns = (range(0, padded.shape[i + 1] - 2, strides[i]) for i in range(2))
    want = np.array([[padded[:, i : i + 3, j : j + 3].mean((1, 2)) for j in columns] for i in rows])
    np.testing.assert_allclose(found[..., 0], want.transpose(2, 0, 1), rtol=1e-5)
    # Where all magnitudes agree the scaled product of signs is the convolution itself.
    signs, kernel = jnp.sign(x), jnp.sign(normal(rng, 3, 3, 3, 4))

    def convolved(x, w):
        return jax.lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    exact = convolved(2.0 * signs, 0.5 * kernel)
    scaled = convolved(signs, kernel) * training.xnor_input_scales(2.0 * signs, window, strides, "VALID") * 0.5
    np.testing.assert_allclose(scaled, exact, rtol=1e-5)


# Grids


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_wrpn_weights_are_those_that_are_stored(bits, rng):
    w, n = normal(rng, 9, 4), 2 ** (bits - 1) - 1
    value, pull = jax.vjp(lambda w: training.wrpn(w, bits), w)
    clipped = np.clip(np.asarray(w, np.float64), -1, 1)
    np.testing.assert_allclose(value, np.round(clipped * n) / n, atol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones_like(w))[0], np.abs(np.asarray(w)) < 1)
    stored = jc.quantize.Int(bits, axis=None, clip=jc.quantize.ranges.Fixed(None, 1.0))(w)
    np.testing.assert_allclose(stored.materialize(), value, atol=1e-6)
    with pytest.raises(ValueError, match="bits=1 leaves none beside the sign"):
        training.wrpn(w, 1)


@pytest.mark.parametrize(("name", "dtype"), [("e2m3", ml_dtypes.float6_e2m3fn), ("e3m2", ml_dtypes.float6_e3m2fn)])
def test_six_bit_blocks_are_those_of_another_implementation(name, dtype, rng):
    """Ties, subnormals and what saturates among them."""
    x = rng.normal(size=480) * rng.choice([1e-3, 0.3, 3.0], 480)
    x = np.concatenate([x, np.arange(-64, 64) / 32]).astype(np.float32).reshape(-1, 32, 1)
    most = float(ml_dtypes.finfo(dtype).max)
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max(1, keepdims=True))) - np.floor(np.log2(most)))
    want = np.clip(x / scale, -most, most).astype(dtype).astype(np.float32) * scale
    node = jc.quantize.Microscaling(name)(jnp.asarray(x.reshape(-1, 1)))
    np.testing.assert_array_equal(node.materialize(), want.reshape(-1, 1))
    assert node.nbits() == 6 * x.size + 8 * x.size // 32


def test_five_bits_of_incremental_quantization_have_the_papers_eight_magnitudes(rng):
    """Zhou et al. 2017, equations 3 and 4: n1 = floor(log2(4 s / 3)), n2 = n1 + 1 - 2**(b - 1) / 2."""
    w = np.asarray(normal(rng, 400, 1)) * np.exp(2 * np.asarray(normal(rng, 400, 1)))
    top = int(np.floor(np.log2(4 * np.abs(w).max() / 3)))
    powers = 2.0 ** np.arange(top + 1 - 2**4 // 2, top + 1)
    node = jc.quantize.PowersOfTwo(bits=5, magnitudes=8)(jnp.asarray(w))
    found = np.abs(np.asarray(node.materialize()))
    assert set(np.unique(found)) == {0.0, *powers}
    levels = np.array([0.0, *powers])
    np.testing.assert_array_equal(found, levels[np.abs(np.abs(w)[..., None] - levels).argmin(-1)])
    with pytest.raises(ValueError, match="magnitudes=16 is not an integer from 1 to 15"):
        jc.quantize.PowersOfTwo(bits=5, magnitudes=16)


# Pruned ternary weights


def test_pruned_ternary_weights_are_a_projection_with_the_gradient_of_a_direction(rng):
    w, g = normal(rng, 10, 4), np.asarray(normal(rng, 10, 4))
    value, pull = jax.vjp(lambda w: training.pruned_ternary(w, 0.6), w)
    stored = jc.chain(jc.prune.Magnitude(0.6, scope="output"), jc.quantize.Int(bits=1))(w)
    np.testing.assert_allclose(value, stored.materialize(), rtol=1e-5)
    wide, value = np.asarray(w, np.float64), np.asarray(value, np.float64)
    norm, u = np.linalg.norm(wide, axis=0), wide / np.linalg.norm(wide, axis=0)
    want = (g - (g * u).sum(0) * u) * np.linalg.norm(value, axis=0) / norm
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], want, rtol=1e-4, atol=1e-6)
    tensor = training.pruned_ternary(w.reshape(5, 2, 4), 0.5, axes=(-3, -2, -1))
    assert int((tensor != 0).sum()) == 20 and len(np.unique(np.round(np.abs(tensor), 6))) == 2
    assert not training.pruned_ternary(jnp.zeros((3, 2)), 0.5).any()


# Integers alone


@pytest.mark.parametrize("multiplier", [0.999, 0.5, 0.0123, 3e-5, 2.0**-31, 1e-12])
def test_requantization_is_that_of_whole_numbers(multiplier, rng):
    m0, n = jc.quantize.fixed_point(multiplier)
    assert 2**30 <= int(m0) < 2**31
    assert int(m0) * 2.0**-31 * 2.0 ** -int(n) == np.float32(multiplier)
    sums = rng.integers(-(2**31), 2**31, 2000) >> rng.integers(0, 31, 2000)
    sums = np.concatenate([sums, [0, 1, -1, 2**31 - 1, -(2**31)]])
    shift = 31 + int(n)
    for zero, bits, signed in ((3, 8, True), (-5, 4, True), (128, 8, False)):
        low = -(2 ** (bits - 1)) if signed else 0
        want = [((int(x) * int(m0) + (1 << (shift - 1))) >> shift) + zero for x in sums]
        want = [min(max(x, low), low + 2**bits - 1) for x in want]
        found = jax.jit(lambda x, z=zero, b=bits, s=signed: jc.quantize.requantize(x, m0, n, z, bits=b, signed=s))(
            jnp.asarray(sums, jnp.int32)
        )
        assert found.tolist() == want
        assert found.dtype == (jnp.int8 if signed else jnp.uint8)


def test_a_network_of_integers_alone_is_within_one_code_of_the_simulated_one(rng):
    """Two layers, affine activations, biases in int32: no float between the first code and the last."""
    x, w, b = rng.normal(size=(64, 12)), [rng.normal(size=(12, 16)), rng.normal(size=(16, 5))], rng.normal(size=16)
    h = np.maximum(x @ w[0] + b, 0)
    scales = [np.abs(x).max() / 127, h.max() / 255, np.abs(h @ w[1]).max() / 127]
    steps = [np.abs(k).max(0) / 127 for k in w]
    codes = [np.round(k / s).astype(np.int8) for k, s in zip(w, steps, strict=True)]
    q = np.clip(np.round(x / scales[0]), -127, 127)
    bias = np.round(b / steps[0] / scales[0])
    simulated = np.maximum((q @ codes[0] + bias) * steps[0] * scales[0], 0)
    simulated = np.clip(np.round(simulated / scales[1]), 0, 255) @ codes[1] * steps[1] * scales[1]
    simulated = np.clip(np.round(simulated / scales[2]), -128, 127)

    first = jc.quantize.fixed_point(jnp.asarray(scales[0] * steps[0] / scales[1]))
    second = jc.quantize.fixed_point(jnp.asarray(scales[1] * steps[1] / scales[2]))

    @jax.jit
    def run(x, k0, k1, bias):
        sums = jax.lax.dot(x, k0, preferred_element_type=jnp.int32) + bias
        hidden = jc.quantize.requantize(sums, *first, zero=-128)  # its lowest code is 0.0: the clip is the ReLU
        sums = jax.lax.dot(hidden, k1, preferred_element_type=jnp.int32) + 128 * k1.astype(jnp.int32).sum(0)
        return jc.quantize.requantize(sums, *second)

    args = (jnp.asarray(q, jnp.int8), *map(jnp.asarray, codes), jnp.asarray(bias, jnp.int32))
    found = run(*args)
    assert np.abs(np.asarray(found, np.int32) - simulated).max() <= 1
    assert np.abs(simulated).max() > 100
    assert "f32" not in run.lower(*args).as_text()
    with pytest.raises(ValueError, match="outside"):
        jc.quantize.fixed_point(1.5)
    with pytest.raises(TypeError, match="expected int32"):
        jc.quantize.requantize(jnp.zeros(3), *first)


# Path following on the inputs of a compressed network


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_alignment_is_the_papers_loop_over_the_inputs(rounds, rng):
    """Zhang & Saab 2023, section 3: u carries what is left of the outputs from one coordinate to the next."""
    x = rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8))
    y = x + 0.3 * rng.normal(size=(40, 8))
    y[:, 3] = 0
    w = rng.normal(size=(8, 3))
    u, v = np.zeros((40, 3)), np.zeros((8, 3))
    for turn in range(rounds):
        for t in range(8):
            u += x[:, [t]] * w[t] if turn == 0 else y[:, [t]] * v[t]
            v[t] = y[:, t] @ u / (y[:, t] @ y[:, t]) if t != 3 else 0
            u -= y[:, [t]] * v[t]
    found = jc.quantize.align(jnp.asarray(w), jnp.asarray(y.T @ y), jnp.asarray(y.T @ x), rounds)
    np.testing.assert_allclose(found, v, rtol=2e-3, atol=1e-3)
    best = np.linalg.lstsq(y, x @ w)[0]
    far = jc.quantize.align(jnp.asarray(w), jnp.asarray(y.T @ y), jnp.asarray(y.T @ x), 3000)
    np.testing.assert_allclose(y @ np.asarray(far), y @ best, atol=0.02)
    same = jc.quantize.align(jnp.asarray(w), jnp.asarray(x.T @ x), jnp.asarray(x.T @ x), rounds)
    np.testing.assert_allclose(same, w, rtol=2e-2, atol=2e-3)


def test_aligned_weights_follow_the_dense_outputs_when_rounded(rng):
    x = rng.normal(size=(200, 32))
    y = np.round(x) + 0.1
    w = rng.normal(size=(32, 8))
    gram, cross = jnp.asarray(y.T @ y, jnp.float32), jnp.asarray(y.T @ x, jnp.float32)
    context = jc.Context(key=jax.random.key(0), stats=jc.trace.Stats(gram=gram, axes=(-2,)))
    method = jc.quantize.GPFQ(bits=4, stochastic=True)
    aligned = jc.quantize.align(jnp.asarray(w, jnp.float32), gram, cross, 4)
    nodes = [method(jnp.asarray(k, jnp.float32), context).materialize() for k in (w, aligned)]
    error = [np.linalg.norm(y @ np.asarray(q) - x @ w) / np.linalg.norm(x @ w) for q in nodes]
    assert error[1] < 0.9 * error[0]


# Distortions


def test_distortions_have_the_moments_and_the_ends_they_should(rng):
    w, key = 0.2 * normal(rng, 300, 200), jax.random.key(1)
    from jcompress.quantize import distortions

    added = np.asarray(distortions.additive(w, 0.5, key) - w)
    np.testing.assert_allclose([added.mean(), added.std()], [0, 0.1], atol=2e-3)
    factor = np.asarray(distortions.multiplicative(w, 0.3, key) / w)
    np.testing.assert_allclose([np.median(factor), factor.std()], [1, 0.3], atol=1e-2)
    most = float(jnp.abs(w).max())
    np.testing.assert_allclose(distortions.power(w, 0.0), np.sign(w) * most, rtol=1e-5)
    np.testing.assert_allclose(distortions.power(w, 1.0), w, rtol=1e-5)
    once, twice = distortions.power(distortions.power(w, 0.5), 0.5), distortions.power(w, 0.25)
    np.testing.assert_allclose(once, twice, rtol=1e-4)
    assert not distortions.power(jnp.zeros(3), 0.0).any()


# Layers that follow a teacher


def test_layer_errors_are_those_of_numpy_and_leave_the_teacher_alone(rng):
    student, teacher = ({"a": normal(rng, 3, 4), "b": (normal(rng, 5), normal(rng, 2, 2))} for _ in range(2))
    pairs = zip(jax.tree.leaves(student), jax.tree.leaves(teacher), strict=True)
    want = sum(((np.asarray(s, np.float64) - np.asarray(t)) ** 2).mean() for s, t in pairs)
    np.testing.assert_allclose(jc.distill.layer_errors(student, teacher), want, rtol=1e-5)
    slopes = jax.grad(jc.distill.layer_errors, argnums=(0, 1))(student, teacher)
    np.testing.assert_allclose(slopes[0]["a"], (student["a"] - teacher["a"]) / 6, rtol=1e-5)
    assert not any(x.any() for x in jax.tree.leaves(slopes[1]))
    with pytest.raises(ValueError, match="layer_errors: 0: found shape"):
        jc.distill.layer_errors([jnp.ones(3)], [jnp.ones(4)])


# The optimizer's state


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("square", [False, True])
def test_dynamic_levels_are_those_of_the_paper_and_codes_the_nearest(bits, square, rng):
    """Dettmers et al. 2022: of each decade below the largest, midpoints of ever fewer parts."""
    from jcompress.quantize.training import optimizer

    want = [0.0, 1.0]
    for i in range(bits - 1):
        ends = np.linspace(0.1, 1, 2 ** (i + square) + 1)
        middles = 10.0 ** (i - bits + 2) * (ends[1:] + ends[:-1]) / 2
        want += [*middles, *([] if square else -middles)]
    levels = optimizer.dynamic_levels(bits, square)
    np.testing.assert_allclose(levels, np.sort(want), rtol=1e-12)
    assert len(levels) == 2**bits
    x = rng.normal(size=(256, 3)) * np.exp(4 * rng.normal(size=(256, 3)))
    x = np.asarray(np.abs(x) if square else x, np.float32)
    node = optimizer._encoded(jnp.asarray(x), bits, 64, square)
    scale = np.abs(x).reshape(4, 64, 3).max(1).repeat(64, 0)
    distance = np.abs(x[..., None] / scale[..., None] - levels)
    if square:
        distance[..., 0] = np.where(x > 0, np.inf, distance[..., 0])
    found = np.take_along_axis(distance, np.asarray(node.codes, np.int64)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, distance.min(-1), atol=2e-6)


def test_weak_weights_step_as_far_as_with_floats(rng):
    """Gradients over four orders of magnitude within a block: of the weakest fifth roots of squares kept a ninth."""
    size = jnp.exp(2.0 * normal(rng, 256, 32))
    params, exact, small = {"w": jnp.zeros((256, 32))}, optax.adam(1e-3), jc.quantize.moments(optax.adam(1e-3))
    states = exact.init(params), small.init(params)
    for i in range(20):
        grads = {"w": size * jax.random.normal(jax.random.fold_in(jax.random.key(2), i), size.shape)}
        (a, first), (b, second) = exact.update(grads, states[0]), small.update(grads, states[1])
        states = first, second
    weak = np.asarray(size) < np.quantile(size, 0.2)
    assert 0.5 < float(jnp.abs(b["w"])[weak].mean() / jnp.abs(a["w"])[weak].mean()) < 1.1


def test_a_shifted_backward_pass_multiplies_errors_by_powers_of_two(rng):
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (5, 3), (6, 3)))
    product = training.shifted_backward(jnp.matmul)
    y, pull = jax.vjp(jax.jit(product), x, w)
    np.testing.assert_allclose(y, x @ w, rtol=1e-6)
    dx, dw = pull(g)
    power = np.sign(x) * 2.0 ** np.round(np.log2(np.abs(np.asarray(x, np.float64))))
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5)
    np.testing.assert_allclose(dw, power.T @ np.asarray(g), rtol=1e-5, atol=1e-6)
    few = training.shifted_backward(jnp.matmul, (-1, 1))
    own = jax.grad(lambda w: few(jnp.array([[0.0, 0.3, 0.6, -9.0]]), w).sum())(jnp.ones((4, 1)))
    assert own.ravel().tolist() == [
        0.0,
        0.0,
        0.5,
        -2.0,
    ]  # 0 stays, what is nearer to a quarter is none, 8 is out of range
    with pytest.raises(ValueError, match=r"exponents=\(2, 1\), expected the least and then the largest"):
        training.shifted_backward(jnp.matmul, (2, 1))


def test_drawn_signs_and_shifted_errors_train_a_network(rng):
    x = jnp.asarray(rng.normal(size=(256, 8)), jnp.float32)
    y = x @ jnp.asarray(np.sign(rng.normal(size=(8, 4))), jnp.float32)
    product = training.shifted_backward(jnp.matmul)
    node = training.BinaryConnect(stochastic=True)(jnp.asarray(rng.normal(size=(8, 4)), jnp.float32))
    train, held = jc.split(node)
    tx = optax.chain(optax.adam(0.05), training.clip_values())
    state = tx.init(train)

    def loss(train, key=None):
        return jnp.mean((product(x, jc.merge(train, held).materialize(key=key)) - y) ** 2)

    before = loss(train)
    for number in range(200):
        slopes = jax.grad(loss)(train, jax.random.key(number))
        updates, state = tx.update(slopes, state, train)
        train = optax.apply_updates(train, updates)
    assert loss(train) < 0.3 * before
