"""jc.search against brute force, killed and resumed, and where nothing can be found."""

import itertools
import json
import math
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

PARAMS = {
    name: np.random.default_rng(i).normal(size=(8 * (i + 1), 16)).astype(np.float32) for i, name in enumerate("abc")
}
WEIGHTS = {"a": 9.0, "b": 1.0, "c": 0.1}
FAMILIES = {f"int{n}": [(".*", jc.quantize.Int(bits=n))] for n in (2, 3, 4)}


def score(tree):
    """Falls with the errors of the leaves, and with their products: not a sum over leaves."""
    error = [float(WEIGHTS[k] * ((np.asarray(x) - PARAMS[k]) ** 2).mean()) for k, x in jc.materialize(tree).items()]
    return 1 - math.fsum(error) - 3 * error[0] * error[1]


def brute(allowed, value):
    """The best by all mixtures of the families and dense leaves."""
    trees = [PARAMS, *(jc.compress(PARAMS, jc.plan(PARAMS, rules)) for rules in FAMILIES.values())]
    every = [
        {k: tree[k] for k, tree in zip("abc", chosen, strict=True)} for chosen in itertools.product(trees, repeat=3)
    ]
    known = [(jc.nbits(tree), score(tree)) for tree in every]
    return min(value(*pair) for pair in known if allowed(*pair))


@pytest.mark.parametrize("drop", [0.003, 0.05, 0.4])
def test_the_smallest_model_of_a_small_lattice(drop):
    found = jc.search(score, PARAMS, FAMILIES, drop=drop)
    least = brute(lambda cost, s: s >= 1 - drop, lambda cost, s: cost)
    assert found.best.cost == jc.nbits(found.tree) == least
    assert found.best.score == score(found.tree) >= 1 - drop
    assert jc.nbits(jc.compress(PARAMS, found.plan)) == least
    early = jc.search(score, PARAMS, FAMILIES, drop=drop, evaluations=30)
    assert early.best.cost == least
    assert len(early.rows) <= 30
    uniform = [row.cost for row in found.rows if row.stage == "family" and row.allowed]
    assert all(found.best.cost <= cost for cost in uniform)


def test_the_best_model_under_a_budget():
    budget = jc.nbits(PARAMS) // 6
    found = jc.search(score, PARAMS, FAMILIES, budget=budget)
    assert found.best.cost <= budget
    assert found.best.score == -brute(lambda cost, s: cost <= budget, lambda cost, s: -s)


def test_the_front_of_both():
    found = jc.search(score, PARAMS, FAMILIES, drop=None, evaluations=40, key=jax.random.key(0))
    front = found.front
    assert len(found.rows) == 40
    assert all(a.cost < b.cost and a.score < b.score for a, b in itertools.pairwise(front))
    families = [row for row in found.rows if row.stage in ("family", "dense")]
    alone = jc.budget.SearchResult(found.tree, found.plan, found.best, tuple(families))
    worst = min(row.score for row in found.rows), found.rows[0].cost + 1
    assert found.hypervolume(*worst) > alone.hypervolume(*worst)
    again = jc.search(score, PARAMS, FAMILIES, drop=None, evaluations=40, key=jax.random.key(0))
    assert again.rows == found.rows


def test_many_leaves_are_priced_by_one_score_each_and_coded_sizes_count():
    params = {f"w{i}": np.random.default_rng(i).normal(size=(16, 16)).astype(np.float32) for i in range(12)}
    price = {name: 4.0 ** -(i % 4) for i, name in enumerate(params)}

    def scored(tree):
        return -math.fsum(
            price[k] * float(((np.asarray(x) - params[k]) ** 2).mean()) for k, x in jc.materialize(tree).items()
        )

    families = {f"int{n}": [(".*", jc.quantize.Int(bits=n))] for n in (2, 3, 4, 6)}
    found = jc.search(scored, params, families, drop=0.05, coded=True, evaluations=50)
    assert found.best.cost == jc.nbits(found.tree, coded=True)
    assert sum(row.stage == "sensitivity" for row in found.rows) == 12
    uniform = min(row.cost for row in found.rows if row.stage in ("family", "dense") and row.allowed)
    assert found.best.cost < 0.95 * uniform
    assert len(found.rows) <= 50
    assert str(found).count("\n") == len(found.rows)


# On disk.

JOB = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_smallest as t
calls = 0
def score(tree):
    global calls
    calls += 1
    if calls > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return t.score(tree)
found = t.jc.search(score, t.PARAMS, t.FAMILIES, drop=0.05, workdir=sys.argv[2])
print(calls, found.best.cost, sorted(found.best.names.items()))
"""


def test_killed_twice_and_resumed_it_gives_the_same(tmp_path):
    calls = []

    def counted(tree):
        calls.append(1)
        return score(tree)

    whole = jc.search(counted, PARAMS, FAMILIES, drop=0.05, workdir=tmp_path / "whole")
    folder = str(pathlib.Path(__file__).parent)
    for many in (3, 9):
        command = [sys.executable, "-c", JOB, folder, str(tmp_path / "x"), str(many)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "x" / "evaluations").glob("*.json"))) == 12
    before = len(calls)
    again = jc.search(counted, PARAMS, FAMILIES, drop=0.05, workdir=tmp_path / "x")
    assert len(calls) - before == before - 12
    assert again.rows == whole.rows
    assert again.best == whole.best
    for x, y in zip(jax.tree.leaves(again.tree), jax.tree.leaves(whole.tree), strict=True):
        np.testing.assert_array_equal(x, y)
    jc.search(counted, PARAMS, FAMILIES, drop=0.05, workdir=tmp_path / "x")
    assert len(calls) == 2 * before - 12
    rows = [json.loads(path.read_text()) for path in (tmp_path / "x" / "evaluations").glob("*.json")]
    assert {row["key"]: row["score"] for row in rows} == {
        " ".join(f"{path}={name}" for path, name in row.names.items()): row.score for row in whole.rows
    }
    with pytest.raises(ValueError, match="holds another search, of other drop; give another workdir"):
        jc.search(score, PARAMS, FAMILIES, drop=0.06, workdir=tmp_path / "x")
    with pytest.raises(ValueError, match="holds another search, of other parameters"):
        jc.search(score, {**PARAMS, "a": 2 * PARAMS["a"]}, FAMILIES, drop=0.05, workdir=tmp_path / "x")


def test_one_search_at_a_time_in_a_folder(tmp_path):
    def inner(tree):
        jc.search(score, PARAMS, FAMILIES, workdir=tmp_path)

    with pytest.raises(ValueError, match="another search runs in it"):
        jc.search(inner, PARAMS, FAMILIES, workdir=tmp_path)


# Where nothing can be found.


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"the budget 10 cannot be met: the cheapest methods cost \d+ together"):
        jc.search(score, PARAMS, FAMILIES, budget=10, workdir=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"found the families \[\], expected some"):
        jc.search(score, PARAMS, {})
    with pytest.raises(ValueError, match="score gave 'high' of type str, expected a number"):
        jc.search(lambda tree: "high", PARAMS, FAMILIES)
    with pytest.raises(ValueError, match="the dense parameters score nan"):
        jc.search(lambda tree: jnp.nan, PARAMS, FAMILIES)
    with pytest.raises(ValueError, match="evaluations=2, expected one for each family"):
        jc.search(score, PARAMS, FAMILIES, evaluations=2)
    with pytest.raises(ValueError, match="decides for several leaves at once"):
        jc.search(score, PARAMS, {"all": [(".*", jc.prune.Magnitude(0.5, scope="global"))]})


def test_models_that_break_are_passed_by():
    def broken(tree):
        coarse = any(getattr(x, "bits", 8) == 2 for x in tree.values())
        return math.nan if coarse else score(tree)

    found = jc.search(broken, PARAMS, FAMILIES, drop=0.4)
    assert "int2" not in found.best.names.values()
    assert math.isfinite(found.best.score)


def test_tied_parameters_are_searched_once():
    tied = jc.tie({**PARAMS, "d": jnp.asarray(PARAMS["c"])}, {"d": "c"})
    found = jc.search(lambda tree: score({k: x for k, x in tree.items() if k != "d"}), tied, FAMILIES, drop=0.05)
    assert found.best.cost == jc.nbits(found.tree)
    assert jc.nbits(found.tree) <= jc.nbits(jc.search(score, PARAMS, FAMILIES, drop=0.05).tree)
