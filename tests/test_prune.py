"""Masks: exact counts, ties, patterns, scopes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jcompress as jc
from jcompress.numeric.counting import Count, magnitude_bits, mean_where, reduce_together
from jcompress.numeric.threshold import keep_random, kth_largest
from jcompress.prune import keep_largest


def kept_by_sort(values, count):
    """The mask by a stable sort: ties to the lower index."""
    flat = np.concatenate([np.ravel(v) for v in values])
    order = np.argsort(-flat.astype(np.float64), kind="stable")
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return np.split(mask, np.cumsum([v.size for v in values])[:-1])


SHAPES = ((7, 11), (30,), (2, 3, 4))


def arrays_of(kind, rng):
    draw = {
        "normal": lambda s: rng.normal(size=s),
        "heavy": lambda s: rng.standard_cauchy(size=s),
        "ties": lambda s: rng.integers(-2, 3, size=s).astype(float),
        "constant": lambda s: np.ones(s),
        "zeros": lambda s: np.zeros(s),
        "mostly-zero": lambda s: np.where(rng.uniform(size=s) < 0.8, 0, rng.normal(size=s)),
        "tiny": lambda s: 1e-41 * rng.integers(0, 9, size=s),
        "infinite": lambda s: np.where(rng.uniform(size=s) < 0.1, np.inf, rng.normal(size=s)),
    }[kind]
    return [np.asarray(draw(s), np.float32) for s in SHAPES]


keep = jax.jit(keep_largest)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "constant", "zeros", "mostly-zero", "tiny", "infinite"])
def test_masks_equal_those_of_a_stable_sort(kind, dtype, rng):
    values = [jnp.asarray(v, dtype) for v in arrays_of(kind, rng)]
    if kind == "tiny":
        values = [jnp.asarray(v, dtype) for v in arrays_of(kind, rng)]
    n = sum(v.size for v in values)
    for count in (0, 1, 2, n // 3, n - 1, n):
        expected = kept_by_sort([np.asarray(v, np.float64) for v in values], count)
        for mask, want in zip(keep(values, jnp.uint32(count)), expected, strict=True):
            np.testing.assert_array_equal(np.ravel(mask), want)


@settings(max_examples=60, deadline=None)
@example([0.0] * 23 + [-1.401298464324817e-45], 1)  # a CPU that flushes denormals must not take it for zero
@example([-0.0] * 12 + [0.0] * 12, 7)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=24, max_size=24), st.integers(0, 24))
def test_any_floats_and_any_count(values, count):
    x = np.asarray(values, np.float32)
    (mask,) = keep([jnp.asarray(x)], jnp.uint32(count))
    np.testing.assert_array_equal(np.asarray(mask), kept_by_sort([x], count)[0])


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "mostly-zero", "infinite"])
def test_a_choice_among_some_takes_others_only_where_those_are_too_few(kind, rng):
    values = [jnp.asarray(v) for v in arrays_of(kind, rng)]
    among = [jnp.asarray(rng.uniform(size=v.shape) < 0.4) for v in values]
    shown = [np.where(m, np.abs(v), -1.0) for v, m in zip(values, among, strict=True)]
    n, inside = sum(v.size for v in values), sum(int(m.sum()) for m in among)
    choose = jax.jit(lambda v, m, k: keep_largest(v, k, among=m, by=jnp.abs))
    for count in (0, 1, inside // 2, inside - 1, inside, inside + 3, n):
        expected = kept_by_sort(shown, count)
        for mask, want in zip(choose(values, among, jnp.uint32(count)), expected, strict=True):
            np.testing.assert_array_equal(np.ravel(mask), want)


def test_a_choice_among_none_takes_the_first():
    (mask,) = keep_largest([jnp.array([3.0, 1.0, 2.0])], 2, among=[jnp.zeros(3, bool)])
    assert mask.tolist() == [True, True, False]


@pytest.mark.parametrize("shape", [(64, 50), (3200,), (4, 8, 100)])
def test_a_random_draw_is_exact_uniform_and_of_its_key(shape):
    among = (jnp.arange(3200) % 4 != 0).reshape(shape)
    draw = jax.jit(lambda key, count: keep_random(among, count, key))
    masks = np.stack([np.ravel(draw(jax.random.key(i), jnp.uint32(600))) for i in range(400)])
    assert (masks.sum(1) == 600).all()
    assert not masks[:, ~np.ravel(among)].any()
    # Each of 2400 is drawn a quarter of the time: a binomial count of 400 draws, mean 100, variance 75 (a chi-square).
    often = masks[:, np.ravel(among)].sum(0)
    assert abs(((often - 100.0) ** 2 / 75).mean() - 1) < 4 * (2 / 2400) ** 0.5
    # Neighbours are drawn as often together as apart; so are the draws of neighbouring keys.
    centred = masks[:, np.ravel(among)] - 0.25
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).mean()) < 6 * 0.1875 / a.size**0.5 + 0.1875 / 600
    assert (masks[0] != masks[1]).any()


def test_a_random_draw_of_too_many_takes_others_too():
    mask = keep_random(jnp.array([False, True, False, True]), 3, jax.random.key(0))
    assert mask.tolist() == [True, True, False, True]
    assert not keep_random(jnp.ones(5, bool), 0, jax.random.key(0)).any()


def test_nan_counts_as_largest():
    (mask,) = keep([jnp.array([1.0, jnp.nan, jnp.inf, 3.0])], jnp.uint32(1))
    assert mask.tolist() == [False, True, False, False]


def test_mixed_dtypes_compare_by_value():
    masks = keep_largest([jnp.array([1.0, 3.0], jnp.bfloat16), jnp.array([2.0, 0.5])], 2)
    assert [m.tolist() for m in masks] == [[False, True], [True, False]]


def test_counts_do_not_wrap():
    billion = jnp.uint32(3_000_000_000)
    total = Count.total([billion, billion, billion])
    assert (int(total.high) << 16) + int(total.low) == 9_000_000_000
    left = total.left_after(Count.of(8_999_999_999))
    assert (int(left.high), int(left.low)) == (0, 1)
    assert bool(total.reaches(Count.of(9_000_000_000))) and not bool(total.reaches(Count.of(9_000_000_001)))


def test_the_search_reads_the_values_a_few_times_only(rng):
    """Design: about 6 reads on average. This guards against a search that lost its way."""
    reads = []
    for scale in (1.0, 1e-3):
        x = jnp.abs(jnp.asarray(scale * rng.normal(size=100_000), jnp.float32))
        for part in (0.01, 0.1, 0.5, 0.9):
            reads.append(int(jax.jit(lambda x, k: kth_largest([x], Count.of(k)).reads)(x, jnp.uint32(part * x.size))))
    assert np.mean(reads) < 12


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_the_number_of_zeros_is_exact(sparsity, scope, rng):
    params = {
        "a": jnp.asarray(rng.normal(size=(37, 13)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=101), jnp.float32),
    }
    small = jc.compress(params, jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=sparsity, scope=scope))]))
    zeros = [int((~small[k].mask).sum()) for k in "ab"]
    if scope == "leaf":
        assert zeros == [round(sparsity * 481), round(sparsity * 101)]
    else:
        assert sum(zeros) == round(sparsity * 582)


def test_a_traced_sparsity_gives_the_same_masks(rng):
    w = jnp.asarray(rng.normal(size=(40, 25)), jnp.float32)
    traced = jax.jit(lambda s: jc.prune.Magnitude(sparsity=s)(w).mask)
    for sparsity in (0.0, 0.25, 0.8, 1.0):
        np.testing.assert_array_equal(traced(sparsity), jc.prune.Magnitude(sparsity=sparsity)(w).mask)
    assert traced._cache_size() == 1


def test_ten_levels_under_one_vmap_compile_once(rng):
    params = {"w": jnp.asarray(rng.normal(size=(40, 25)), jnp.float32)}

    def level(sparsity):
        return jc.compress(params, jc.plan(params, [("w", jc.prune.Magnitude(sparsity=sparsity))]))["w"].mask.sum()

    levels = jax.jit(jax.vmap(level))
    assert levels(jnp.linspace(0, 0.9, 10)).tolist() == [1000 - 100 * i for i in range(10)]
    levels(jnp.linspace(0.1, 1.0, 10))
    assert levels._cache_size() == 1


def test_global_and_leaf_scope_differ_on_layers_of_different_scale(rng):
    params = {
        "small": jnp.asarray(rng.normal(size=100), jnp.float32),
        "large": jnp.asarray(9e3 + rng.normal(size=100), jnp.float32),
    }
    plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0.5, scope="global"))])
    small = jc.compress(params, plan)
    assert (int(small["small"].mask.sum()), int(small["large"].mask.sum())) == (0, 100)


def test_masks_do_not_change_with_a_positive_scale(rng):
    w = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    method = jc.prune.Magnitude(sparsity=0.6)
    np.testing.assert_array_equal(method(w).mask, method(1e-6 * w).mask)


def test_a_gradual_ramp_follows_its_schedule_and_nests():
    ramp = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=100)
    w = jax.random.normal(jax.random.key(0), (1000,))
    method, previous = jc.prune.Magnitude(sparsity=ramp), None
    for step in (0, 25, 50, 75, 100, 500):
        mask = jc.compress(w, jc.plan(w, [("", method)]), step=step).mask
        expected = 0.9 * (1 - (1 - min(step / 100, 1)) ** 3)
        assert abs(int((~mask).sum()) - expected * 1000) <= 0.5 + 1e-3
        assert previous is None or not bool((mask & ~previous).any())
        previous = mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (0, 4), (4, 4), (2, 8), (5, 16)])
def test_n_of_m_keeps_the_n_largest_along_the_contraction_axis(n, m, rng):
    w = jnp.asarray(rng.integers(-4, 5, size=(3, 32, 5)), jnp.float32)
    mask = np.asarray(jc.prune.NM(n, m).mask(jnp.abs(w)))
    groups = np.swapaxes(np.asarray(jnp.abs(w)).reshape(3, 32 // m, m, 5), -1, -2)
    order = np.argsort(-groups, axis=-1, kind="stable")
    want = np.zeros_like(groups, bool)
    np.put_along_axis(want, order[..., :n], True, axis=-1)
    np.testing.assert_array_equal(np.swapaxes(mask.reshape(3, 32 // m, m, 5), -1, -2), want)


def test_stacked_layers_get_thresholds_of_their_own():
    w = jnp.stack([jnp.arange(1.0, 9.0).reshape(4, 2), 100 * jnp.arange(1.0, 9.0).reshape(4, 2)])
    assert jc.prune.Magnitude(sparsity=0.5)(w).mask.sum((1, 2)).tolist() == [0, 8]
    assert jc.stacked(jc.prune.Magnitude(sparsity=0.5))(w).mask.sum((1, 2)).tolist() == [4, 4]


def test_random_masks_depend_on_the_key_and_the_path_only(rng):
    params = {k: jnp.asarray(rng.normal(size=(20, 20)), jnp.float32) for k in "ab"}
    plan = jc.plan(params, [(".*", jc.prune.Random(sparsity=0.5))])
    first, again = (jc.compress(params, plan, key=jax.random.key(0)) for _ in range(2))
    other = jc.compress(params, plan, key=jax.random.key(1))
    np.testing.assert_array_equal(first["a"].mask, again["a"].mask)
    assert bool((first["a"].mask != first["b"].mask).any())
    assert bool((first["a"].mask != other["a"].mask).any())
    kept = np.asarray(jnp.abs(params["a"]))[np.asarray(first["a"].mask)].mean()
    assert abs(kept - float(jnp.abs(params["a"]).mean())) < 0.15  # it does not choose by magnitude


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("method", [jc.prune.Magnitude, jc.prune.Random])
def test_a_sparsity_outside_zero_to_one_is_refused(method, sparsity):
    with pytest.raises(ValueError, match=r"sparsity=.* is outside \[0, 1\]"):
        method(sparsity=sparsity)


def test_a_schedule_that_leaves_zero_to_one_names_the_parameter():
    params = {"layer": {"kernel": jnp.ones((4, 4))}}
    plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=lambda step: 0.5 + step))])
    jc.compress(params, plan, step=0)
    with pytest.raises(ValueError, match=r"layer/kernel: Magnitude: sparsity=1.5 is outside"):
        jc.compress(params, plan, step=1)


def test_a_pattern_fixes_the_sparsity():
    assert jc.prune.Magnitude(sparsity=0.5, pattern=jc.prune.NM(2, 4))
    with pytest.raises(ValueError, match=r"sparsity=0.8 disagrees with NM\(n=2, m=4\), which fixes it at 0.5"):
        jc.prune.Magnitude(sparsity=0.8, pattern=jc.prune.NM(2, 4))
    with pytest.raises(ValueError, match="needs a sparsity"):
        jc.prune.Magnitude()
    with pytest.raises(ValueError, match="scope='layer' is unknown"):
        jc.prune.Magnitude(sparsity=0.5, scope="layer")
    with pytest.raises(ValueError, match="expected 0 <= n <= m"):
        jc.prune.NM(5, 4)


def test_a_pattern_that_does_not_fit_names_the_parameter():
    for shape in ((6, 4), (8,)):
        with pytest.raises(ValueError, match=r"kernel: NM\(n=2, m=4\) needs axis -2 in groups of 4"):
            jc.plan({"kernel": jnp.ones(shape)}, [("kernel", jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)))])


def test_random_without_a_key_says_so():
    params = {"kernel": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match=r"kernel: Random needs 'key', which is missing; pass key=jax.random.key"):
        jc.compress(params, jc.plan(params, [("kernel", jc.prune.Random(sparsity=0.5))]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_magnitude_bits_order_magnitudes_above_zero_and_nan_last(rng, dtype):
    x = jnp.asarray(np.r_[rng.standard_normal(200), 0.0, -0.0, np.inf, -np.inf]).astype(dtype)
    bits, size = np.asarray(magnitude_bits(x)).astype(np.int64), np.abs(np.asarray(x.astype(jnp.float32)))
    assert ((bits[:, None] < bits) == (size[:, None] < size)).all() and bits.min() >= 1
    assert int(magnitude_bits(jnp.asarray(jnp.nan, x.dtype))) > bits.max()


@pytest.mark.parametrize("shape", [(96, 1024), (1 << 17,), (7, 3, 5000), (99_991,)])
def test_a_large_choice_by_parts_is_that_of_a_stable_sort(rng, shape):
    x = np.round(rng.standard_normal(shape) * 50).astype(np.float32)  # many ties
    count = x.size // 3
    wanted = np.zeros(x.size, bool)
    wanted[np.argsort(-np.abs(x).ravel(), kind="stable")[:count]] = True
    found = keep_largest([jnp.asarray(x)], count, by=jnp.abs)[0]
    np.testing.assert_array_equal(np.asarray(found).ravel(), wanted)
    start, add = [jnp.uint32(0), jnp.float32(0)], [jax.lax.add, jax.lax.max]
    total, most = reduce_together([found.astype(jnp.uint32), jnp.asarray(x)], start, add)
    assert int(total) == count and float(most) == x.max()
    mean = np.asarray(x, np.float64).ravel()[wanted].mean()
    assert float(mean_where(jnp.asarray(x), found)) == pytest.approx(mean, abs=1e-3)


def _as_in(i, kind, rng):
    shape = [(4, 4), (3,), (70, 80), (5, 5), (4, 4), (0, 3), ()][i % 7]
    x = rng.integers(-3, 4, size=shape) if kind == "ties" else rng.normal(size=shape)
    return jnp.asarray(x, jnp.bfloat16 if kind == "bfloat16" or (kind == "mixed" and i % 2) else jnp.float32)


@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16", "mixed"])
@pytest.mark.parametrize("chosen", [False, True])
def test_many_leaves_have_the_masks_of_one_sort(kind, chosen, rng):
    xs = [_as_in(i, kind, rng) for i in range(30)]
    among = [jnp.asarray(rng.random(x.shape) < 0.7) for x in xs]
    flat = np.concatenate([np.abs(np.asarray(x, np.float32)).ravel() for x in xs])
    if chosen:
        flat = np.where(np.concatenate([np.ravel(m) for m in among]), flat, -1)
    order = np.argsort(-flat, kind="stable")
    for k in (0, 1, flat.size // 10, flat.size // 2, flat.size):
        found = keep_largest(xs, k, among=among if chosen else None, by=jnp.abs)
        assert [m.shape for m in found] == [x.shape for x in xs]
        want = np.zeros(flat.size, bool)
        want[order[:k]] = True
        np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in found]), want)


def test_a_global_threshold_is_one_program_for_many_leaves():
    """What is compiled for each leaf is elementwise: searches and reductions do not grow with their number."""

    def searches(number):
        like = {f"layer{i}": jax.ShapeDtypeStruct([(40, 120), (8,), (9, 3)][i % 3], jnp.float32) for i in range(number)}
        plan = jc.plan(like, [(".*", jc.prune.Magnitude(sparsity=0.5, scope="global"))])
        text = jax.jit(lambda p: jc.materialize(jc.compress(p, plan))).lower(like).compile().as_text()
        return len(re.findall(r" (?:while|reduce)\(", text))

    assert searches(96) == searches(48)
