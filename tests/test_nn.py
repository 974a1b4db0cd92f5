"""Compact filters: formulas, what each must equal, and every verb on them."""

import subprocess
import sys

import compact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jcompress as jc

ROWS = pytest.mark.parametrize("row", compact.ROWS.values(), ids=compact.ROWS.keys())
X = compact.normal(1, 2, compact.SIDE, compact.SIDE, 4)
normal = compact.normal


def dense(x, kernel, strides=1, padding="SAME", groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (strides,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


@ROWS
def test_numbers_and_multiply_adds_are_those_of_the_formulas(row):
    fn, state = compact.built(row)
    cost = jc.trace.cost(fn, state, X)
    assert jax.eval_shape(fn, state, X).shape[1:] == row.shape
    assert sum(x.size for x in jax.tree.leaves(state)) == row.numbers
    if row.multiply_adds is not None:
        assert cost.total.multiply_adds == row.multiply_adds
    assert not cost.notes


@ROWS
def test_statistics_or_the_reason(row):
    fn, state = compact.built(row)
    kernels = [path for path, x in jc.paths(state) if x.ndim > 1]
    _, found = jax.jit(lambda state: jc.trace.observe(fn, state, X))(state)
    if not row.reason:
        assert set(found) == set(kernels)
        return
    assert row.reason in {**found.notes, **found.unread}[kernels[0]]
    with pytest.raises(ValueError, match=f"{kernels[0]}.*{row.reason}"):
        jc.calibrate(fn, state, [(X,)])


@ROWS
def test_cut_units_are_as_masked_ones(row):
    fn, state = compact.built(row)
    groups = jc.trace.coupling(fn, state, X)
    assert tuple(groups.prunable) == row.cut and not groups.unread
    assert all(group.reason for name, group in groups.items() if name not in row.cut)
    if row.cut:
        keep = {name: jnp.arange(group.size) != 1 for name, group in groups.prunable.items()}
        small, params = jc.shrink(fn, state, keep, X)
        close(jax.jit(small)(params, X), jax.jit(fn)(jc.trace.mask(state, groups, keep), X))


@ROWS
def test_codes_run_as_they_are_and_come_back_from_a_file(row, tmp_path):
    fn, state = compact.built(row)
    kernels = [(path, jc.quantize.Int(bits=8)) for path, x in jc.paths(state) if x.ndim > 1]
    small = jc.compress(state, jc.plan(state, [*kernels, (".*", None)]))
    fast, want = jc.accelerate(fn), jax.jit(fn)(jc.materialize(small), X)
    close(jax.jit(fast)(small, X), want, 1e-4)
    jc.save(tmp_path / "small.jc", small)
    for again in (jc.load(tmp_path / "small.jc"), jc.load(tmp_path / "small.jc", like=state)):
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again, small)), strict=True))
    model = row.build(nnx.Rngs(1))
    nnx.update(model, jc.materialize(jc.load(tmp_path / "small.jc")))
    close(model(row.front(X)), want, 1e-4)


@ROWS
def test_sixteen_bits(row):
    fn, state = compact.built(row)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (state, X))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    y, want = jax.jit(fn)(*half), jax.jit(fn)(*wide)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.abs(y - want).max()) < 0.06 * float(jnp.abs(want).max())


@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_features_turn_with_the_image(group):
    elements = {"p4": 4, "p4m": 8}[group]
    kernel, last = normal(2, 3, 3, 3, 2), normal(3, 5, 5, elements, 2, 3)
    bias = normal(4, 2)

    @jax.jit
    def features(x):
        lifted = jax.nn.relu(jc.nn.lift_convolution(x, kernel, bias, group, strides=2, padding="VALID"))
        return lifted, jc.nn.group_convolution(lifted, last / 10)

    x = normal(5, 2, 9, 9, 3)
    before = features(x)
    assert float(jnp.std(before[1])) > 0.1
    for g in range(elements):
        for y, want in zip(features(jc.nn.transform_plane(x, g)), before, strict=True):
            close(y, jc.nn.transform_plane(want, g, elements))


def test_elements_act_as_a_group():
    """Turns of four, reflections of two, and one element for each pair."""
    x = normal(0, 3, 3, 8, 2)
    found = [jc.nn.transform_plane(x, g, 8) for g in range(8)]
    for a in range(8):
        pairs = [jc.nn.transform_plane(found[a], b, 8) for b in range(8)]
        same = [[bool(jnp.array_equal(y, z)) for z in found] for y in pairs]
        assert all(sum(row) == 1 for row in same)
        assert sorted(row.index(True) for row in same) == list(range(8))


def test_four_copies_pool_to_what_no_turn_changes():
    layer = jc.nn.CyclicConv(3, 8, rngs=nnx.Rngs(0))
    head = normal(1, 8, 4)

    @jax.jit
    def outputs(x):
        y = jax.nn.relu(layer(jc.nn.cyclic_slice(x)))
        maps = jc.nn.cyclic_pool(y, jnp.max)
        stacked = jc.nn.cyclic_stack(y)
        return jc.nn.cyclic_pool(y[:, 1, 2] @ head), maps, stacked

    x = normal(2, 2, 6, 6, 3)
    first, maps, stacked = outputs(x)
    assert stacked.shape == (2, 6, 6, 32)
    for turns in range(1, 4):
        y, turned, _ = outputs(jnp.rot90(x, turns, (1, 2)))
        close(y, first)
        close(turned, jnp.rot90(maps, turns, (1, 2)))


def test_what_filters_share():
    x = normal(0, 2, 6, 6, 3)
    positive, negative = jnp.split(jc.nn.crelu(x), 2, axis=-1)
    close(positive - negative, x)
    bias = normal(1, 1, 3)
    close(jc.nn.multi_bias(x, bias), jax.nn.relu(x + bias[0]))
    # A meta filter's translations are the patches of it.
    meta, moves = normal(2, 5, 4 + 1, 3, 2), 3
    y = jc.nn.doubly_convolution(x, meta, window=3)
    patches = jax.lax.conv_general_dilated_patches(
        meta.transpose(3, 0, 1, 2), (3, 3), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(2, moves, moves, 3, 3, 3)
    kernel = patches.transpose(4, 5, 3, 1, 2, 0).reshape(3, 3, 3, -1)
    close(y, dense(x, kernel))
    pooled = jc.nn.doubly_convolution(x, meta, window=3, pool=3)
    close(pooled, y.reshape(2, 6, 6, 9, 2).max(3))


@pytest.mark.parametrize("multiplier", [1, 2, 6])
def test_a_dense_kernel_as_a_depthwise_and_a_pointwise_one(multiplier):
    kernel = normal(0, 3, 3, 4, 6)
    depthwise, pointwise = jc.nn.depthwise_kernels(kernel, multiplier)
    whole = jnp.einsum("xycm,cmo->xyco", depthwise.reshape(3, 3, 4, multiplier), pointwise.reshape(4, multiplier, 6))
    x = normal(1, 2, 6, 6, 4)
    close(jc.nn.depthwise_separable(x, depthwise, pointwise), dense(x, whole))
    errors = [np.linalg.svd(kernel[:, :, c].reshape(9, 6))[1][multiplier:] for c in range(4)]
    close(jnp.sum((whole - kernel) ** 2), sum(float(e @ e) for e in errors), 1e-3)


def test_groups_and_shuffles():
    x, kernel = normal(0, 2, 6, 6, 6), normal(1, 3, 3, 6, 4)
    blocks = jc.nn.grouped_kernel(kernel, 2)
    mask = jnp.kron(jnp.eye(2), jnp.ones((3, 2)))
    close(jc.nn.grouped_convolution(x, blocks, 2, shuffle=False), dense(x, kernel * mask))
    close(jc.nn.grouped_convolution(x, kernel, 1), dense(x, kernel))
    shuffled = jc.nn.channel_shuffle(x, 2)
    assert sorted(jc.nn.channel_shuffle(jnp.arange(6), 2).tolist()) == list(range(6))
    np.testing.assert_array_equal(jc.nn.channel_shuffle(shuffled, 3), x)


def test_splits_in_turn():
    x, u, v = normal(0, 2, 5, 5, 4), normal(1, 3, 3, 2, 3), normal(2, 3, 3, 3, 3)
    first, h = dense(x[..., :2], u), dense(dense(x[..., :2], u), v)
    second = 0.4 * jax.nn.relu(dense(x[..., 2:], u) + h) + 0.9 * h
    y = jc.nn.split_recurrent(x, u, v, 2, gain=0.4, decay=0.1)
    close(y, jnp.concatenate([first, second], -1), 1e-4)
    close(jc.nn.split_recurrent(x, jnp.tile(u, (1, 1, 2, 1)), v, 1), dense(x, jnp.tile(u, (1, 1, 2, 1))))


def test_blocks_are_their_layers():
    x = normal(0, 2, 5, 5, 4)
    ws = [
        (normal(i, *shape), normal(i + 9, shape[-1]))
        for i, shape in enumerate([(1, 1, 4, 3), (1, 1, 3, 2), (3, 3, 3, 2)])
    ]
    y = jax.nn.relu(dense(x, ws[0][0]) + ws[0][1])
    want = jax.nn.relu(jnp.concatenate([dense(y, k) + b for k, b in ws[1:]], -1))
    close(jc.nn.fire(x, *ws), want)
    ws = [
        (normal(i, *shape), normal(i + 9, shape[-1]))
        for i, shape in enumerate([(1, 1, 4, 8), (3, 3, 1, 8), (1, 1, 8, 4)])
    ]
    y = jnp.clip(dense(x, ws[0][0]) + ws[0][1], 0, 6)
    y = jnp.clip(dense(y, ws[1][0], groups=8) + ws[1][1], 0, 6)
    close(jc.nn.inverted_residual(x, *ws), x + dense(y, ws[2][0]) + ws[2][1], 1e-4)
    assert jc.nn.inverted_residual(x, *ws, strides=2).shape == (2, 3, 3, 4)
    (a, b), (c, d) = (normal(1, 4, 2), normal(2, 2)), (normal(3, 2, 4), normal(4, 4))
    scale = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ a + b) @ c + d)
    close(jc.nn.squeeze_excite(x, (a, b), (c, d)), x * scale[:, None, None])


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (1, 3))], ids=str)
@pytest.mark.parametrize("size", [(5, 8), (6, 7)], ids=str)
def test_fast_filters_are_the_dense_convolution(padding, size):
    x, kernel, large = normal(0, 2, *size, 3), normal(1, 3, 3, 3, 4), normal(2, 5, 4, 3, 4)
    close(jc.nn.winograd_convolution(x, kernel, padding=padding), dense(x, kernel, padding=padding), 1e-4)
    close(jc.nn.fft_convolution(x, large, padding=padding), dense(x, large, padding=padding), 1e-4)


def test_states_of_dense_layers_fit_the_fast_ones():
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(3))
    for layer in (jc.nn.WinogradConv(4, 6, rngs=nnx.Rngs(0)), jc.nn.FFTConv(4, 6, 3, rngs=nnx.Rngs(0))):
        nnx.update(layer, nnx.state(conv))
        close(layer(X), conv(X))


RNGS = nnx.Rngs(0)
WRONG = {
    "18, which 4 does not divide": lambda: jc.nn.CyclicConv(3, 18, rngs=RNGS),
    "5, which 2 does not divide": lambda: jc.nn.CReLUConv(3, 5, rngs=RNGS),
    "group 'p6'": lambda: jc.nn.GroupConv(3, 5, group="p6", rngs=RNGS),
    "same pixels of 6": lambda: jc.nn.LiftConv(4, 5, 3, strides=2, rngs=RNGS)(X),
    "a turned window must be square": lambda: jc.nn.LiftConv(4, 5, (3, 1), rngs=RNGS)(X),
    "of 4 or 8 elements": lambda: jc.nn.group_convolution(X[..., None], jnp.ones((3, 3, 4, 2, 2))),
    "square images": lambda: jc.nn.cyclic_slice(X[:, 1:]),
    "in_features 4, which 3 does not divide": lambda: jc.nn.GroupedConv(4, 6, groups=3, rngs=RNGS),
    "out_features 7, which 4 does not divide": lambda: jc.nn.DoublyConv(4, 7, rngs=RNGS),
    "meta_size 2": lambda: jc.nn.DoublyConv(4, 7, meta_size=2, rngs=RNGS),
    "out_features 7, which 2 does not divide": lambda: jc.nn.Fire(4, 7, 2, rngs=RNGS),
    "multiplier 7": lambda: jc.nn.depthwise_kernels(jnp.ones((3, 3, 4, 6)), 7),
    "positions, 2 channels": lambda: jc.nn.SplitRecurrentConv(4, 6, splits=2, rngs=RNGS)(X[..., :2]),
    "expected \\(3, 3\\)": lambda: jc.nn.WinogradConv(4, 6, 5, rngs=RNGS),
    "less than a window of": lambda: jc.nn.fft_convolution(X, jnp.ones((9, 9, 4, 2)), padding="VALID"),
    "0 copies": lambda: jc.nn.MultiBias(4, 0, rngs=RNGS),
    "expected x \\(batch, positions": lambda: jc.nn.SqueezeExcite(3, 2, rngs=RNGS)(X),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_is_told(words):
    with pytest.raises(ValueError, match=words):
        WRONG[words]()


def test_flax_is_imported_when_it_is_asked_for():
    code = "import sys, jcompress as jc; assert 'flax' not in sys.modules; jc.nn.crelu; assert 'flax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'none'"):
        _ = jc.none
