"""Masks that follow a pattern: whole blocks, rows and columns, masks shared by leaves, thresholds by outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_conformance import collectives

import jcompress as jc
from jcompress.prune import NM, Block, Magnitude, Random, Shared, scores


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def blocks_by_hand(x, sizes):
    """The mean magnitude of each block, by slices."""
    grid = [n // b for n, b in zip(x.shape, sizes, strict=True)]
    means = np.zeros(grid)
    for place in itertools.product(*map(range, grid)):
        means[place] = np.abs(x[tuple(slice(i * b, (i + 1) * b) for i, b in zip(place, sizes, strict=True))]).mean()
    return means


@pytest.mark.parametrize(
    ("shape", "block", "sizes"),
    [
        ((8, 12), (2, 3), (2, 3)),
        ((8, 12), (None, 1), (8, 1)),
        ((8, 12), (1, None), (1, 12)),
        ((8, 12), (4,), (1, 4)),
        ((3, 3, 4, 6), (None, None, None, 1), (3, 3, 4, 1)),
        ((3, 3, 4, 6), (None, None, 1, 1), (3, 3, 1, 1)),
        ((3, 3, 4, 6), (2, 3), (1, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 1.0])
def test_blocks_are_kept_or_cut_whole_by_their_mean_and_the_count_is_exact(shape, block, sizes, sparsity, rng):
    w = normal(rng, *shape)
    mask = np.asarray(Magnitude(sparsity, pattern=Block(block))(w).mask)
    means = blocks_by_hand(np.asarray(w, np.float64), sizes)
    kept = means.size - round(sparsity * means.size)
    want = np.zeros(means.size, bool)
    want[np.argsort(-means.ravel(), kind="stable")[:kept]] = True
    want = np.kron(want.reshape(means.shape), np.ones(sizes, bool))
    np.testing.assert_array_equal(mask, want)


def test_blocks_work_with_any_score_scope_and_traced_sparsity(rng):
    params = {"a": normal(rng, 8, 8), "b": 3 * normal(rng, 4, 8)}
    grads = jax.tree.map(jnp.sin, params)
    method = jc.prune.ByScore(sparsity=0.5, scope="global", pattern=Block((4, 4)), score=scores.taylor)
    small = jc.compress(params, jc.plan(params, [(".*", method)]), grads=grads)
    means = {k: blocks_by_hand(np.asarray(params[k] * grads[k]), (4, 4)) for k in params}
    threshold = np.sort(np.concatenate([m.ravel() for m in means.values()]))[-3]
    for k in params:
        np.testing.assert_array_equal(small[k].mask, np.kron(means[k] >= threshold, np.ones((4, 4), bool)))
    counts = jax.jit(jax.vmap(lambda s: Magnitude(s, pattern=Block((2, 4)))(params["a"]).mask.sum()))
    assert counts(jnp.array([0.25, 0.5, 1.0])).tolist() == [48, 32, 0]
    key = jax.random.key(0)
    random = jc.compress(params["a"], jc.plan(params["a"], [("", Random(0.5, pattern=Block((1, None))))]), key=key)
    assert sorted(random.mask.sum(1).tolist()) == [0] * 4 + [8] * 4


def test_a_block_that_an_outer_mask_hides_goes_first(rng):
    w = jnp.ones((4, 4)).at[:2].set(100.0)
    where = jnp.ones((4, 4), bool).at[:2, :2].set(False).at[2, 2].set(False)
    node = Magnitude(0.25, pattern=Block((2, 2)))(w, jc.Context(where=where))
    assert node.mask.tolist() == [[False] * 2 + [True] * 2] * 2 + [[True] * 4] * 2


def test_whole_columns_are_stored_for_one_bit_each(rng):
    node = Magnitude(0.5, pattern=Block((None, 1)))(normal(rng, 64, 32))
    assert node.nbits() - 32 * 64 * 16 <= 64


def test_project_keeps_parameters_on_blocks_and_on_shared_masks(rng):
    params = {"a": normal(rng, 8, 8), "b": normal(rng, 8, 8), "c": normal(rng, 8, 4)}
    ramp = optax.linear_schedule(0.0, 0.5, 2)
    plan = jc.plan(
        params,
        [("[ab]", Magnitude(ramp, pattern=Shared(Block((1, None))))), ("c", Magnitude(ramp, pattern=Block((4, 2))))],
    )
    tx = optax.chain(optax.adamw(0.1), jc.project(plan))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    rows = {k: np.asarray((params[k] != 0).any(1)) for k in "ab"}
    np.testing.assert_array_equal(rows["a"], rows["b"])
    assert rows["a"].sum() == 4
    assert int((params["c"] != 0).sum()) == 16


@pytest.mark.parametrize("inner", [None, NM(2, 4), Block((2, 2))], ids=str)
def test_a_shared_mask_is_that_of_the_summed_scores(inner, rng):
    params = {"a": normal(rng, 8, 4), "b": normal(rng, 8, 4)}
    sparsity = None if isinstance(inner, NM) else 0.5
    small = jc.compress(params, jc.plan(params, [(".*", Magnitude(sparsity, pattern=Shared(inner)))]))
    total = jnp.abs(params["a"]) + jnp.abs(params["b"])
    want = Magnitude(sparsity, pattern=inner)(total).mask
    for name in params:
        np.testing.assert_array_equal(small[name].mask, want)
        assert int((small[name].materialize() != 0).sum()) == 16


@pytest.mark.parametrize("shape", [(10, 6), (3, 3, 2, 6), (7,)])
def test_by_output_every_output_keeps_its_largest(shape, rng):
    w = normal(rng, *shape)
    mask = np.asarray(jax.jit(lambda w, s: Magnitude(s, scope="output")(w).mask)(w, 0.7))
    columns = np.abs(np.asarray(w)).reshape(-1, shape[-1] if len(shape) > 1 else 1)
    kept = len(columns) - round(0.7 * len(columns))
    want = np.zeros(columns.shape, bool)
    np.put_along_axis(want, np.argsort(-columns, axis=0, kind="stable")[:kept], True, axis=0)
    np.testing.assert_array_equal(mask.reshape(want.shape), want)
    assert Magnitude(0.5, scope="output")(jnp.zeros((4, 0))).mask.shape == (4, 0)


def test_by_output_the_statistics_say_which_axes_are_summed_over(rng):
    def fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    params = {"w": normal(rng, 3, 8, 8)}
    stats = jc.calibrate(fn, params, [normal(rng, 5, 8)])
    plan = jc.plan(params, [("w", Magnitude(0.5, scope="output"))])
    assert (jc.compress(params, plan, stats=stats)["w"].mask.sum(1) == 4).all()


@pytest.mark.parametrize("method", [Magnitude(0.5, scope="output"), Magnitude(0.5, pattern=Block((None, 1)))], ids=str)
def test_sharded_outputs_are_decided_where_they_are(method, rng):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    w = normal(rng, 16, 64)
    placed = jax.device_put(w, NamedSharding(mesh, P(None, "model")))
    compress = jax.jit(lambda w: method(w).mask)
    sizes = [size for _, size in collectives(compress.lower(placed).compile().as_text())]
    assert max(sizes, default=0) <= 64
    np.testing.assert_array_equal(compress(placed), method(w).mask)


def test_patterns_that_do_not_fit_name_the_parameter_and_the_axis():
    params = {"kernel": jnp.ones((6, 4)), "other": jnp.ones((3, 4))}
    for pattern in (Block((4, 2)), Shared(Block((4, 2)))):
        with pytest.raises(
            ValueError, match=r"kernel: Block\(shape=\(4, 2\)\) needs axis -2 in blocks of 4, found length 6"
        ):
            jc.plan(params, [("kernel", Magnitude(0.5, pattern=pattern))])
    with pytest.raises(ValueError, match=r"kernel: .* needs 3 axes, found shape \(6, 4\)"):
        jc.plan(params, [("kernel", Magnitude(0.5, pattern=Block((1, 1, 1))))])
    with pytest.raises(ValueError, match=r"other: leaves that share one mask .* found \(3, 4\) and at kernel \(6, 4\)"):
        jc.compress(params, jc.plan(params, [(".*", Magnitude(0.5, pattern=Shared()))]))
    with pytest.raises(ValueError, match="expected a positive size, or None"):
        Block((0, 2))
    with pytest.raises(ValueError, match="Magnitude needs a sparsity"):
        Magnitude(pattern=Block((2, 2)))
    with pytest.raises(ValueError, match="needs a sparsity"):
        Magnitude(pattern=Shared())
    with pytest.raises(ValueError, match=r"disagrees with Shared\(pattern=NM\(n=2, m=4\)\), which fixes it at 0.5"):
        Magnitude(0.9, pattern=Shared(NM(2, 4)))
    with pytest.raises(ValueError, match="scope='output' decides for single weights"):
        Magnitude(0.5, scope="output", pattern=Block((2, 2)))
    for pattern in (Block((2, 2)), Shared()):
        with pytest.raises(ValueError, match="fixes no sparsity"):
            pattern.mask(jnp.ones((2, 2)))
