"""The report, ratios, latency, and the picture."""

import itertools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rows import METHODS

import jcompress as jc
from jcompress import measure
from jcompress.measure import Latency, Point


def _params(rng, shape=(16, 8)):
    return {"a": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32), "bias": jnp.zeros(shape[-1])}}


def _compress(params, rules):
    plan = jc.plan(params, rules)
    return jc.compress(params, plan, key=jax.random.key(0)), plan


FROM_WEIGHTS = [row for row in METHODS if set(getattr(row.method, "needs", ())) <= {"key"}]


@pytest.mark.parametrize("row", FROM_WEIGHTS, ids=lambda row: row.name)
def test_report_agrees_with_nbits_and_with_numpy(row, rng):
    params = _params(rng, row.shape)
    small, _ = _compress(params, [(".*/kernel", row.method)])
    table = jc.report(params, small)

    assert table.total.stored_bytes * 8 == jc.nbits(small)
    assert table.total.dense_bytes * 8 == jc.nbits(params)
    for r in (*table.rows, table.total):
        assert r.value_bytes + r.index_bytes + r.codebook_bytes + r.scale_bytes == r.stored_bytes
        assert r.bits_per_weight * r.size == pytest.approx(8 * r.stored_bytes)
    bias, kernel = table.rows
    assert (bias.path, kernel.path) == ("a/bias", "a/kernel")
    before, after = (np.asarray(x, np.float64) for x in (params["a"]["kernel"], jc.materialize(small)["a"]["kernel"]))
    assert kernel.relative_error == pytest.approx(np.linalg.norm(before - after) / np.linalg.norm(before), abs=1e-6)
    assert kernel.density == np.count_nonzero(after) / after.size
    assert table.total.relative_error == pytest.approx(kernel.relative_error)  # the bias is zero before and after


def test_the_parts_of_the_cost_in_closed_form(rng):
    params = {
        name: jnp.asarray(rng.normal(size=(64, 32)), jnp.float32) for name in ("int", "mask", "shared", "svd", "two")
    }
    small, _ = _compress(
        params,
        [
            ("int", jc.quantize.Int(bits=4, group_size=16, symmetric=False)),
            ("mask", jc.prune.Magnitude(pattern=jc.prune.NM(2, 4))),
            ("shared", jc.chain(jc.share.KMeans(clusters=8), jc.quantize.Int(bits=8))),
            ("svd", jc.chain(jc.factorize.SVD(rank=2), jc.quantize.Int(bits=8))),
            ("two", jc.residual(jc.quantize.Int(bits=2), jc.factorize.SVD(rank=2))),
        ],
    )
    rows = {row.path: row for row in jc.report(params, small).rows}

    def costs(path):
        row = rows[path]
        return row.value_bytes, row.index_bytes, row.codebook_bytes, row.scale_bytes

    n, groups = 64 * 32, 4 * 32
    assert costs("int") == (n / 2, 0, 0, groups * 4 + groups / 2)
    assert costs("mask") == (n / 2 * 4, n / 4 * 3 / 8, 0, 0)  # one of six subsets for every four
    assert costs("shared") == (n * 3 / 8, 0, 8 + 4, 0)  # the codebook's own scale is a cost of the codebook
    assert costs("svd") == (64 * 2 + 2 * 32, 0, 0, 4 * 2 + 4 * 32)
    assert costs("two") == (n / 4 + 4 * (64 * 2 + 2 * 32), 0, 0, 4 * 32)


def test_methods_shown_are_formats_or_the_plan(rng):
    params = _params(rng)
    method = jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.share.KMeans(clusters=4), jc.quantize.Int(bits=8))
    small, plan = _compress(params, [(".*/kernel", method)])
    assert [row.method for row in jc.report(params, small).rows] == ["dense", "Masked(Codebook(Quantized))"]
    assert [row.method for row in jc.report(params, small, plan).rows] == ["dense", repr(method)]


def test_nothing_compressed_changes_nothing(rng):
    params = _params(rng)
    total = jc.report(params, params).total
    assert (total.ratio, total.relative_error, total.bits_per_weight) == (1.0, 0.0, 32.0)
    assert total.index_bytes == total.codebook_bytes == total.scale_bytes == 0


def test_all_kinds_of_trees(rng):
    w = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    params = ({"w": w}, [w, None], w)
    small, _ = _compress(params, [("0/w|2", jc.quantize.Int(bits=8))])
    table = jc.report(params, small)
    assert [row.path for row in table.rows] == ["0/w", "1/0", "2"]
    assert table.total.stored_bytes * 8 == jc.nbits(small)


def test_nnx_state():
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param)
    small, _ = _compress(state, [("kernel", jc.prune.Magnitude(sparsity=0.75))])
    rows = {row.path: row for row in jc.report(state, small).rows}
    assert rows["kernel"].method == "Masked"
    assert rows["kernel"].density == 0.25
    assert rows["bias"].method == "dense"


def test_sharded_parameters(rng):
    params = _params(rng, (32, 16))
    rules = [(".*/kernel", jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.quantize.Int(bits=4)))]
    expected = jc.report(params, _compress(params, rules)[0])
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    found = jc.report(sharded, _compress(sharded, rules)[0])
    assert found.total.stored_bytes == expected.total.stored_bytes
    assert found.total.relative_error == pytest.approx(expected.total.relative_error, rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1.0], math.inf),
        ([3.0, 4.0], [3.0, 0.0], 0.8),
        ([3e37, 4e37], [3e37, 0.0], 0.8),
        ([3e-30, 4e-30], [3e-30, 0.0], 0.8),
        ([], [], 0.0),
    ],
)
def test_relative_error_of_extreme_values(before, after, error):
    as_tree = [{"w": jnp.asarray(x, jnp.float32)} for x in (before, after)]
    assert jc.report(*as_tree).total.relative_error == pytest.approx(error)


def test_leaves_that_are_no_floats():
    params = {
        "count": jnp.int32(1_000_000),
        "flags": jnp.array([True, False]),
        "key": jax.random.key(0),
        "narrow": jnp.ones(4, jnp.float8_e4m3fn),
        "number": 2.0,
        "w": jnp.array([3.0, 4.0]),
    }
    table = jc.report(params, params | {"w": jnp.array([3.0, 0.0])})
    assert table.total.stored_bytes * 8 == jc.nbits(params)
    assert "number" not in {row.path for row in table.rows}  # a Python scalar is no parameter
    assert {row.path: row.relative_error for row in table.rows if row.relative_error} == {"w": pytest.approx(0.8)}
    assert table.total.relative_error == pytest.approx(math.sqrt(16 / (25 + 4)))  # counts and keys are no weights


def test_text_is_aligned_and_has_a_total(rng):
    params = {f"block_{i}": _params(rng) for i in range(3)} | {"a_long_name" * 5: jnp.zeros(3)}
    method = jc.chain(jc.prune.Magnitude(sparsity=0.9, scope="global"), jc.share.KMeans(clusters=16, exact=True))
    small, plan = _compress(params, [(".*/kernel", method), ("block_0/a/bias", jc.quantize.Int(bits=4))])
    table = jc.report(params, small, plan)
    head, *lines = str(table).splitlines()
    assert len(lines) == len(table.rows) + 1
    assert lines[-1].startswith("total")
    assert all(len(line) <= 120 for line in lines)
    for name in ("density", "bits/w", "stored", "index", "codebook", "scale", "ratio", "error"):
        end = head.index(name) + len(name)  # numbers end where their column's name ends
        assert all(line[end - 1] != " " and line[end : end + 2].strip() == "" for line in lines)
    assert len(repr(table)) < 100
    assert "\n" not in repr(table)


def test_html_is_escaped_and_whole():
    params = {"<w>": jnp.ones(3)}
    shown = jc.report(params, params)._repr_html_()
    assert "&lt;w&gt;" in shown
    assert "<w>" not in shown
    assert shown.count("<tr>") == shown.count("</tr>") == 3


def test_pandas_has_a_row_a_parameter(rng):
    pytest.importorskip("pandas")
    params = _params(rng)
    table = jc.report(params, params)
    frame = table.to_pandas()
    assert frame["stored_bytes"].sum() == table.total.stored_bytes
    assert list(frame["path"]) == ["a/bias", "a/kernel"]


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("pandas", "table", lambda: jc.report({"w": jnp.ones(2)}, {"w": jnp.ones(2)}).to_pandas()),
        ("matplotlib.figure", "plot", lambda: measure.pareto([Point("dense", 1, 1)])),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, module, extra, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f'pip install "jcompress[{extra}]"')):
        call()


@pytest.mark.parametrize(
    ("after", "match"),
    [
        ({"a": jnp.ones((2, 2))}, "'b' before and missing after"),
        ({"a": jnp.ones((2, 2)), "c": jnp.ones(2)}, "'b' before and 'c' after"),
        ({"a": jnp.ones((2, 2)), "b": jnp.ones(2), "c": jnp.ones(2)}, "missing before and 'c' after"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, r"a: found shape \(2, 3\) after, expected \(2, 2\)"),
    ],
)
def test_trees_that_differ_are_refused(after, match):
    with pytest.raises(ValueError, match=match):
        jc.report({"a": jnp.ones((2, 2)), "b": jnp.ones(2)}, after)


def test_other_wrong_arguments_are_refused(rng):
    params = _params(rng)
    small, _ = _compress(params, [(".*/kernel", jc.quantize.Int(bits=8))])
    with pytest.raises(ValueError, match="a/kernel: found a Quantized node in the first tree"):
        jc.report(small, params)
    with pytest.raises(ValueError, match="a/bias: not in the plan"):
        jc.report(params, small, {})
    with pytest.raises(ValueError, match=r"a/bias: report reads values.*outside jit"):
        jax.jit(lambda p: jc.report(params, p) and p)(small)
    with pytest.raises(ValueError, match=r"a/bias: report reads values.*outside jit"):
        jax.jit(lambda p: jc.report(p, small) and p)(params)


def test_ratios():
    assert measure.compression_ratio(7, 7) == 1
    assert measure.compression_ratio(7, 0) == math.inf
    assert measure.compression_ratio(0, 0) == 1
    for a, b in ((8, 2), (5, 4), (3, 6)):
        assert measure.space_saving(a, b) == pytest.approx(1 - 1 / measure.compression_ratio(a, b))
    assert measure.space_saving(7, 0) == 1
    assert measure.space_saving(0, 0) == 0
    for wrong in ((-1, 2), (1, -2)):
        with pytest.raises(ValueError, match="found"):
            measure.compression_ratio(*wrong)
        with pytest.raises(ValueError, match="found"):
            measure.space_saving(*wrong)
    with pytest.raises(ValueError, match="0 after"):
        measure.space_saving(0, 1)


def test_sparsity_is_one_minus_the_density_of_the_report(rng):
    params = _params(rng)
    small, _ = _compress(params, [(".*/kernel", jc.prune.Magnitude(sparsity=0.5))])
    assert measure.sparsity(small) == pytest.approx(1 - jc.report(params, small).total.density)
    assert measure.sparsity({}) == 0


def test_latency_counts_its_calls_and_orders_its_spread():
    calls = []
    found = measure.latency(lambda x: calls.append(x) or x, jnp.ones(2), repeats=4, warmup=2)
    assert len(calls) == 6
    assert found.n == 4
    assert 0 < found.low <= found.median <= found.high


def test_latency_summary_in_closed_form():
    found = Latency.of([float(i) for i in range(11)])
    assert (found.low, found.median, found.high, found.n) == (1.0, 5.0, 9.0, 11)


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_latency_refuses_impossible_counts(wrong):
    with pytest.raises(ValueError, match="expected at least"):
        measure.latency(lambda: 0, **wrong)


def _dominates(p, q):
    no_worse = p.stored_bytes <= q.stored_bytes and p.score >= q.score
    return no_worse and (p.stored_bytes < q.stored_bytes or p.score > q.score)


@pytest.mark.parametrize("levels", [3, 1000])
def test_front_by_brute_force(levels, rng):
    for count in (0, 1, 2, 30):
        points = [Point(str(i), *rng.integers(1, levels, 2).tolist()) for i in range(count)]
        expected = {p.label for p in points if not any(_dominates(q, p) for q in points)}
        front = measure.non_dominated(points)
        assert {p.label for p in front} == expected
        assert len(front) == len(expected)
        assert [p.stored_bytes for p in front] == sorted(p.stored_bytes for p in front)


@pytest.mark.parametrize("wrong", [(0, 1.0), (-5, 1.0), (math.inf, 1.0), (1, math.nan), (1, 1.0, -1.0)])
def test_points_that_cannot_be_drawn_are_refused(wrong):
    with pytest.raises(ValueError, match="worst: found stored_bytes"):
        Point("worst", *wrong)


def _points():
    return [
        Point("dense", 1e6, 98.0, 0.2),
        Point("random 90%", 1.4e5, 93.0, 0.9, group="random"),
        Point("magnitude 80%", 2.5e5, 97.6, 0.4, group="magnitude"),
        Point("magnitude 90%", 1.4e5, 97.2, 0.5, group="magnitude"),
        Point("8 bits", 2.7e5, 97.6, 0.4, group="integers"),
        Point("4 bits", 1.36e5, 97.3, 0.5, group="integers"),
        Point("magnitude 90% + 16 values", 4e4, 97.3, 0.4, group="shared"),
        Point("", 3e4, 70.0, 0.4, group="shared"),
    ]


def test_picture_is_written_and_its_labels_are_apart(tmp_path):
    text = pytest.importorskip("matplotlib.text")
    path = tmp_path / "pareto.png"
    figure = measure.pareto(_points(), path, lowest=90)
    assert path.read_bytes().startswith(b"\x89PNG")
    figure.draw_without_rendering()  # positions at the figure's own resolution again, after saving at another
    axes = figure.axes[0]
    assert {note.get_text() for note in axes.texts} == {p.label for p in _points() if p.label}
    boxes = [text.Text.get_window_extent(note) for note in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    legend = {entry.get_text() for entry in axes.get_legend().get_texts()}
    assert legend == {"random", "magnitude", "integers", "shared"}


def test_picture_tells_plans_apart_and_draws_the_front():
    pytest.importorskip("matplotlib")
    axes = measure.pareto(_points()).axes[0]
    handles = axes.get_legend().get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in handles}) == len(handles)
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert front.get_xdata().tolist() == [p.stored_bytes for p in measure.non_dominated(_points())]
    assert axes.get_xscale() == "log"


def test_picture_writes_out_scores_below_the_axis():
    pytest.importorskip("matplotlib")
    points = [Point("dense", 100, 98.0), Point("low", 50, 12.3)]
    texts = [text.get_text() for text in measure.pareto(points, lowest=90).axes[0].texts]
    assert texts == ["dense", "low (12.3)"]


def test_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no points"):
        measure.pareto([])


def _shapes(params, plan):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return like, jax.eval_shape(lambda p: jc.compress(p, plan, step=0, key=jax.random.key(0)), like)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        (jc.quantize.Int(4, group_size=16), 0),
        (jc.quantize.HQQ(3, group_size=16), 0),
        (jc.share.KMeans(16), 0),
        (jc.factorize.SVD(rank=4), 0),
        (jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), 0),
        (jc.chain(jc.prune.Magnitude(pattern=jc.prune.NM(1, 8)), jc.quantize.Int(4)), 0),
        (jc.residual(jc.quantize.Int(2), jc.factorize.SVD(2)), 0),
        (jc.prune.Magnitude(0.5), 0.001),
        (jc.prune.Magnitude(0.97), 0.01),
        (jc.prune.Magnitude(lambda step: 0.9), 0.01),
        (jc.chain(jc.prune.Random(0.9), jc.quantize.Int(4)), 0.02),
        (jc.residual(jc.prune.Magnitude(0.99), jc.quantize.Int(4)), 0.01),
        (jc.stacked(jc.prune.Random(0.9)), 0.01),
    ],
    ids=repr,
)
def test_sizes_of_shapes_are_those_of_values(method, tolerance, rng):
    params = {
        "w": jnp.asarray(rng.normal(size=(128, 64, 16) if "stacked" in repr(method) else (512, 256)), jnp.float32)
    }
    plan = jc.plan(params, [("w", method)])
    like, nodes = _shapes(params, plan)
    true = jc.nbits(jc.compress(params, plan, step=0, key=jax.random.key(0)))
    assert jax.tree.structure(nodes) == jax.tree.structure(jc.compress(params, plan, step=1, key=jax.random.key(0)))
    assert abs(jc.nbits(nodes) - true) <= tolerance * true
    table = jc.report(like, nodes, plan)
    assert 8 * table.total.stored_bytes == jc.nbits(nodes)
    assert math.isnan(table.total.relative_error)
    assert "nan" not in str(table)


def test_a_mask_of_which_nothing_is_known_counts_as_whole(rng):
    params = {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}
    plan = jc.plan(params, [("w", jc.prune.Nonzero())])
    assert jc.nbits(_shapes(params, plan)[1]) == 64 * 64 * 33 >= jc.nbits(jc.compress(params, plan))


def test_densities_next_to_the_ends_are_not_rounded_to_them():
    params = {"few": jnp.zeros(10_000).at[3].set(1), "most": jnp.ones(10_000).at[3].set(0), "all": jnp.ones(3)}
    shown = {line.split()[0]: line.split()[2] for line in str(jc.report(params, params)).splitlines()}
    assert (shown["few"], shown["most"], shown["all"]) == ("0.01%", ">99.9%", "100%")


def test_long_paths_lose_their_middle():
    path = "encoder_" + "x" * 60 + "_kernel"
    shown = str(jc.report({path: jnp.ones(3)}, {path: jnp.ones(3)})).splitlines()[1].split()[0]
    assert shown.startswith("encoder_")
    assert shown.endswith("_kernel")
    assert len(shown) == 36


def test_the_report_tells_of_running_variances_that_no_longer_hold(rng):
    def net(kernel, var):
        return {"params": {"kernel": kernel}, "batch_stats": {"bn": {"mean": jnp.zeros(8), "var": var}}}

    dense = net(jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), jnp.ones(8))
    plan = jc.plan(dense, [("params/.*", jc.prune.Magnitude(0.5))])
    small = jc.compress(dense, plan)
    old = "batch_stats/bn/var: running variances are those before compression; see jc.rewrite.reestimate"
    assert str(jc.report(dense, small)).splitlines()[-1] == old
    assert jc.report(dense, dense).notes == ()
    again = net(small["params"]["kernel"], jnp.full(8, 0.7))
    assert jc.report(dense, again).notes == ()
    collapsed = net(small["params"]["kernel"], jnp.full(8, 0.7).at[3].set(1e-9))
    assert "batch_stats/bn/var: running variances fell to zero" in jc.report(dense, collapsed).notes[0]
    assert "reestimate" in jc.report(dense, collapsed)._repr_html_()
    assert jc.report(jax.eval_shape(lambda: dense), jax.eval_shape(lambda: small)).notes == ()
