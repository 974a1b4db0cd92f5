"""The comparison of families: every way gives a network of fewer bytes, and an interrupted run continues."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments.families import __main__ as command
from experiments.families import ways
from experiments.families.lab import Config, Lab

TINY = Config(steps=30, finetuning=5, seeds=1, calibration=64)


@pytest.fixture(scope="module")
def lab():
    return Lab(TINY, None)


@pytest.mark.parametrize("name", [x.name for x in ways.FAMILIES if x.name not in ways.LAYERED])
def test_every_family_makes_the_network_smaller(lab, name):
    family = next(family for family in ways.FAMILIES if family.name == name)
    dense = lab.size(ways.Network(lab.dense(0)))
    network = family.make(lab, 0, family.points[len(family.points) // 2])
    size = lab.size(network)
    if name == "dense":
        assert size == dense and size["multiply_adds"] == 64 * 300 + 300 * 100 + 100 * 10
        return
    assert size["bytes"] < 0.8 * dense["bytes"] and size["multiply_adds"] <= 2.01 * dense["multiply_adds"]
    after = lab.finetuned(network, 0)
    assert jax.tree.structure(after.tree) == jax.tree.structure(network.tree)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), jc.materialize(after.tree), jc.materialize(network.tree))
    assert any(jax.tree.leaves(moved))
    assert 0 <= lab.score(after, 0)["test_accuracy"] <= 1


@pytest.mark.parametrize("n", [784, 300, 64, 10, 7])
def test_modes_multiply_to_the_size(n):
    assert np.prod(ways.modes(n)) == n
    if n != 7:
        assert max(ways.modes(n)) <= n / 2


def test_chosen_ranks_stay_within_their_budget(lab):
    network = ways.chosen(ways.ranks)(lab, 0, 0.3)
    bits, whole = jc.budget.bits(network.tree), jc.budget.bits(lab.dense(0))
    kernels = [path for path in whole if path.endswith("kernel")]
    assert sum(bits[path] for path in kernels) <= 0.3 * sum(whole[path] for path in kernels)


@pytest.mark.parametrize("name", ["tied layers"])
def test_a_network_of_equal_layers(name):
    params = {f"block_{i}": {"a": {"kernel": jnp.full((4, 4), 1.0 + i)}} for i in range(3)}
    params |= {"embed": {"embedding": jnp.ones((6, 4))}, "head": {"kernel": jnp.zeros((4, 6))}}
    lab = types.SimpleNamespace(dense=lambda seed: params)
    family = next(family for family in ways.FAMILIES if family.name == name)
    for point, numbers in ((2, 3 * 16 + 24), (1, 16 + 48), (3, 16 + 24)):
        tree = family.make(lab, 0, point).tree
        assert jc.nbits(tree) == 32 * numbers
        dense = jc.materialize(tree)
        assert float(dense["block_2"]["a"]["kernel"][0, 0]) == (2.0 if point & 1 else 3.0)
        assert float(dense["head"]["kernel"][0, 0]) == (0.5 if point & 2 else 0.0)


def test_the_command_continues_and_writes_a_table_and_a_picture(tmp_path, capsys):
    flags = ["--config.ways=dense,SVD", "--config.steps=5", "--config.finetuning=2", "--config.seeds=1"]
    flags += [f"--workdir={tmp_path}"]
    assert command.main(flags) == 0
    rows = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(rows[:3]) + "\n")
    assert command.main(flags) == 0
    again = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    first = [json.loads(row) for row in rows]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in first]
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert "| SVD |" in (tmp_path / "table.md").read_text()
    assert "3 of them there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [({"ways": ("svd",)}, "'svd' is unknown"), ({"seeds": 0}, "seeds=0"), ({"model": "cnm"}, "'cnm' is unknown")],
)
def test_a_mistaken_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        command.Comparison(dataclasses.replace(TINY, **config), None, None)
