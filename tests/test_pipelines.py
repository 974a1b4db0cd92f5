"""The experiments on whole files: their tables by hand, stages that keep what others fixed, and resuming."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments import orders, page, pipelines
from experiments.codec import __main__ as codec


def test_a_picture_is_moved_whole():
    x = jnp.arange(2 * 5 * 5.0).reshape(2, 5, 5, 1) + 1
    found = np.asarray(pipelines.shifted(x, 1, jax.random.key(0)))
    for before, after in zip(np.asarray(x), found, strict=True):
        wide = np.pad(before, ((1, 1), (1, 1), (0, 0)))
        moved = [wide[a : a + 5, b : b + 5] for a, b in itertools.product(range(3), repeat=2)]
        assert any((after == y).all() for y in moved)


def test_some_pipelines_are_named_by_their_last_stages(tmp_path, capsys):
    flags = ["--epochs=0.02", "--seeds=1", f"--workdir={tmp_path}", "--only=share"]
    assert pipelines.main(flags) == 0
    assert "| dense > prune > share |" in (tmp_path / "table.md").read_text()
    assert pipelines.main([*flags[:3], "--only=code"]) == 0 and "3 rows, 2 of them there" in capsys.readouterr().out
    assert "| dense > prune > code |" in (tmp_path / "table.md").read_text()
    assert pipelines.main([*flags[:3], "--only=shared"]) == 2
    assert "shared" in capsys.readouterr().err


def test_half_of_the_units_are_the_best_ones():
    rng = np.random.default_rng(0)
    sizes = {"dense_0": (12, 6), "dense_1": (6, 4), "head": (4, 3), "exit": (6, 3)}
    params = {k: {"kernel": jnp.asarray(rng.normal(size=s)), "bias": jnp.zeros(s[1])} for k, s in sizes.items()}
    for unit in (1, 3, 4):
        params["dense_0"]["kernel"] = params["dense_0"]["kernel"].at[:, unit].multiply(100)
    found = orders.narrowed(params)
    shapes = {name: layer["kernel"].shape for name, layer in found.items()}
    assert shapes == {"dense_0": (12, 3), "dense_1": (3, 2), "head": (2, 3), "exit": (3, 3)}
    np.testing.assert_array_equal(found["dense_0"]["kernel"], params["dense_0"]["kernel"][:, [1, 3, 4]])
    np.testing.assert_array_equal(found["exit"]["kernel"], params["exit"]["kernel"][jnp.array([1, 3, 4])])


def test_interactions_are_differences_of_means():
    """An error that is the place of D, and one point less where P comes before Q."""
    rows = []
    for order in map("".join, itertools.permutations("DPQE")):
        error = order.index("D") - (order.index("P") < order.index("Q"))
        rows.append({"order": order, "test": float(error), "bytes": 10, "test bit operations": 5.0})
    told = {(first, second): error for first, second, error, *_ in orders.interactions(rows)[1:]}
    assert told["P", "Q"] == "-1.00"
    assert float(told["D", "P"]) < -1


def test_the_threshold_loses_at_most_a_tenth_of_a_point():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 10, 2000)
    late = np.eye(10)[y] * 9
    early = np.eye(10)[np.where(rng.random(2000) < 0.1, (y + 1) % 10, y)] * rng.uniform(1, 9, (2000, 1))
    threshold = orders._threshold(late, early, y)
    error, left = orders._judged(late, early, y, threshold)
    assert error <= 0.1 + 1e-9
    assert 0 <= left < 0.5


def test_ours_is_the_smallest_that_is_no_worse_on_data_held_out():
    times = {"encode": 1.0, "decode": 0.5}

    def row(coder, size, held, score):
        return {"network": "n", "coder": coder, "bytes": size, "held out": held, "score": score, "times": times}

    rows = [row("none", 4000, 0.0, 1.0), row("NNCodec", 500, 0.2, 1.5)]
    rows += [row("ours", 300, 0.3, 1.2), row("ours", 400, 0.2, 1.4), row("ours", 450, 0.1, 1.1)]
    _, found = codec.table(rows)
    assert found[:6] == ["n", "8.00x", "+0.5000", "10.00x", "+0.4000", "1.25x"]


def test_a_page_names_every_record(tmp_path):
    (tmp_path / "pruning").mkdir()
    lines = '{"seed": 0, "way": "dense"}\n{"seed": 1, "way": "dense"}\n'
    (tmp_path / "pruning" / "digits.jsonl").write_text(lines)
    (tmp_path / "pruning" / "digits.md").write_text("a table")
    page.write(tmp_path)
    text, site = (tmp_path / "index.md").read_text(), (tmp_path / "index.html").read_text()
    assert "| pruning/digits | pruning | python -m experiments.prune |" in text
    assert "| 2 | 2 | dense; random masks |" in text
    assert "266,610" in text and "431,080" in text
    assert '<a href="pruning/digits.md">pruning/digits</a>' in site


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5"])
def test_pipelines_that_begin_alike_share_their_stages(name):
    known = {}
    for pipeline in pipelines.pipelines(name).values():
        stages = []
        for stage, make in pipeline.stages.items():
            stages.append(stage)
            assert pipelines._told(known.setdefault(tuple(stages), make)) == pipelines._told(make)


def test_stages_resume_from_their_files(tmp_path):
    """The second call makes nothing again, and what a stage gave is on disk, coded."""
    args = types.SimpleNamespace(
        data="digits",
        data_dir=None,
        model="lenet_300_100",
        only="",
        epochs=0.05,
        shift=0,
        workdir=str(tmp_path),
        seeds=1,
    )
    staged = pipelines.Staged(args)
    first = staged.measure(None, 0, "dense")
    second = staged.measure(None, 0, "dense > 4 bits")
    assert 5 * second["bytes"] < first["bytes"] and "test" in second and "test" not in first
    tree = jc.load(tmp_path / "models" / "0-dense-4_bits.jc")
    assert tree["head"]["kernel"].bits == 4
    assert (tmp_path / "models" / "0-dense-4_bits.jc").stat().st_size == second["bytes"]
    with pytest.raises(jc.io.StorageError):
        staged.measure(None, 1, "dense > 4 bits")  # what comes before is not there


@pytest.mark.parametrize("model", ["lenet_300_100", "lenet5"])
def test_units_without_weights_or_readers_are_cut_and_the_function_stays(model, tmp_path):
    bench = pipelines.Bench(model, functools.partial(pipelines.load_split, "digits", None))
    params = jax.tree.map(lambda x: x + 0.1, bench.start(0))
    names = [name for name in params if name != "head"]
    gone = {name: 5 + i for i, name in enumerate(names[-2:])}  # behind padding a constant is none at the border
    for name, count in gone.items():
        params[name]["kernel"] = params[name]["kernel"].at[..., :count].set(0)  # these are constant
    params["head"]["kernel"] = params["head"]["kernel"].at[-7:].set(0)  # and nothing reads these
    plan = jc.plan(params, [(".*kernel", jc.quantize.Int(8, axis=None)), (".*", None)])
    tree = jc.compress(params, plan)
    small = pipelines.cut(bench, tree, 0)
    assert all(isinstance(small[name]["kernel"], jc.formats.Quantized) for name in params)
    whole = {name: params[name]["bias"].size for name in names}
    gone[names[-1]] += 7
    assert {name: small[name]["bias"].size for name in names} == {n: whole[n] - gone.get(n, 0) for n in names}
    jc.save(tmp_path / "small.jc", small, coded=True)
    again, x = jc.materialize(jc.load(tmp_path / "small.jc")), bench.load(0).val.x[:50]
    np.testing.assert_allclose(
        bench.sized(again).apply(again, x), bench.apply(jc.materialize(tree), x), rtol=1e-4, atol=1e-4
    )


def test_the_dense_network_teaches_what_was_cut():
    params = {}
    bench = pipelines.Bench(
        "lenet_300_100", functools.partial(pipelines.load_split, "digits", None), scale=0.5, dense=params.get
    )
    params[7] = bench.start(0)
    cut = jax.tree.map(jnp.copy, params[7])
    cut["dense_0"]["kernel"] = cut["dense_0"]["kernel"].at[:, 20:].set(0)
    small = pipelines.cut(bench, jc.compress(cut, jc.plan(cut, [(".*", jc.quantize.Int(8, axis=None))])), 0)
    own, taught = (
        jc.materialize(pipelines.learn(bench, small, 7, price=0.0, epochs=1, what=".*", by=by))
        for by in ("itself", "dense")
    )
    assert own["dense_0"]["kernel"].shape == taught["dense_0"]["kernel"].shape == (64, 20)
    x = bench.load(0).train.x[:200]
    told, apply = bench.apply(params[7], x), bench.sized(own).apply
    far = [float(jnp.abs(jax.nn.softmax(apply(p, x)) - jax.nn.softmax(told)).mean()) for p in (own, taught)]
    assert far[1] < far[0]
