"""The scripted training run on 8 simulated devices: under three kinds of plans, stopped, continued, and refused."""

import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jcompress as jc

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import data, runner, train
from experiments.configs import train_decoder, train_resnet
from experiments.training import meshes, pipeline, steps

MODEL = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 32}
MESHES = {
    "project": {"data": 1, "fsdp": 8, "tensor": 1},
    "simulate": {"data": 1, "fsdp": 4, "tensor": 2},
    "nodes": {"data": 2, "fsdp": 2, "tensor": 2},
}


def tiny(how="project", module=train_decoder, **changes):
    config = module.get_config("tiny")
    config.update({"steps": 4, "batch_size": 16, "log_every": 2, "eval_every": 2, "eval_batches": 1})
    config.update({"checkpoint": {"every": 3}, "optimizer": {"warmup": 1}, "compress": {"how": how, "every": 2}})
    if module is train_decoder:
        config.model.update(MODEL)
        config.data.options.update({"length": 8, "examples": 64})
        config.mesh = MESHES[how]
    for path, value in changes.items():
        *above, last = path.split(".")
        functools.reduce(lambda part, name: part[name], above, config)[last] = value
    return config


class StopAt(runner.Signals):
    """Receives a signal once so many steps are taken."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    @property
    def received(self):
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None

    @received.setter
    def received(self, value):
        pass


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of each kind, from beginning to end."""
    made = {}

    def run(how):
        if how not in made:
            folder = tmp_path_factory.mktemp(how)
            made[how] = folder, train.run(tiny(how), folder)
        return made[how]

    return run


@pytest.mark.parametrize("how", steps.HOW)
def test_a_run_writes_metrics_checkpoints_and_the_compressed_parameters(finished, how):
    folder, found = finished(how)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["of"]) for row in rows] == [(2, "train"), (2, "test"), (4, "train"), (4, "test")]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "4"]
    record = json.loads((folder / "record.json").read_text())
    assert record["finished"] and record["summary"] == found.scores
    assert found.scores["bytes"] == (folder / "model.jc").stat().st_size
    same(jc.load(folder / "model.jc"), found.tree)
    node = found.tree["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(node, jc.formats.Masked)
    assert int((~node.mask).sum()) == round(0.8 * node.mask.size)


@pytest.mark.parametrize("how", steps.HOW)
def test_all_that_belongs_to_a_parameter_is_spread_as_it_is(finished, how):
    state = finished(how)[1].state
    mesh = state.params["embed"]["embedding"].sharding.mesh
    for name, axes in {"up": ("fsdp", "tensor"), "down": ("tensor", "fsdp")}.items():
        own = [x for path, x in named(state) if f"mlp/{name}/kernel" in path]
        assert len(own) == (3 if how == "simulate" else 4)  # the parameter, its two moments, and its mask
        for x in own:
            assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, *axes)), 3)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in leaves]


def test_stopped_and_continued_bit_for_bit(finished, tmp_path, step=2):
    with pytest.raises(runner.Interrupted):
        train.run(tiny(), tmp_path, signals=StopAt(step))
    assert (tmp_path / "checkpoints" / str(step)).is_dir() and not (tmp_path / "model.jc").exists()
    folder, whole = finished("project")
    same(train.run(tiny(), tmp_path).state, whole.state)
    for name in ("model.jc", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_another_mesh_goes_on_from_the_same_state(finished, tmp_path):
    with pytest.raises(runner.Interrupted):
        train.run(tiny(), tmp_path, signals=StopAt(3))
    other = train.Run(tiny(mesh={"data": 2, "fsdp": 1, "tensor": 4}), tmp_path)
    first = train.Run(tiny(), tmp_path)
    with first.checkpoints() as checkpoints:
        same(*(jax.device_get(made.begin(checkpoints)) for made in (first, other)))
    assert other.batches.position == first.batches.position
    for a, b in zip(jax.tree.leaves(next(first.batches)), jax.tree.leaves(next(other.batches)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_resnet_is_trained_in_four_bits(tmp_path):
    config = tiny("simulate", train_resnet, **{"accumulate": 2, "data.options.examples": 128, "steps": 3})
    found = train.run(config, tmp_path)
    assert isinstance(jc.load(tmp_path / "model.jc")["layer1/0/conv1/weight"], jc.formats.Quantized)
    assert float(found.state.extra["bn1/running_mean"].max()) != 0


def test_gradients_of_parts_are_those_of_the_whole(rng):
    def loss(params, extra, batch):
        return jnp.square(batch["x"] @ params - batch["y"]).mean(), extra + 1

    params = jnp.asarray(rng.normal(size=3), jnp.float32)
    batch = {"x": jnp.asarray(rng.normal(size=(1, 8, 3)), jnp.float32), "y": jnp.ones((1, 8))}
    parts = {name: x.reshape(4, 2, *x.shape[2:]) for name, x in batch.items()}
    whole, sums = (steps.gradients(loss, params, jnp.zeros(()), x) for x in (batch, parts))
    assert (int(whole[1]), int(sums[1])) == (1, 4)
    np.testing.assert_allclose(sums[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(sums[2], whole[2], rtol=1e-5)


def test_examples_come_once_an_epoch_and_go_on_from_a_position():
    mesh = meshes.make_mesh({"data": 8})
    split = data.Split(np.arange(32), np.arange(32))

    def batches():
        return pipeline.Batches(
            pipeline.Source(split), 16, mesh, parts=2, seed=3, change=lambda x, rng: {**x, "r": rng.random()}
        )

    first = batches()
    seen = [next(first) for _ in range(4)]
    for epoch in (seen[:2], seen[2:]):
        assert sorted(np.concatenate([np.ravel(x["x"]) for x in epoch])) == list(range(32))
    assert seen[0]["x"].shape == (2, 8) and seen[0]["x"].sharding.shard_shape((2, 8)) == (2, 1)
    again, first = batches(), batches()
    for _ in range(2):
        next(first)
    again.position = first.position
    same(next(again), seen[2])


WRONG = {
    "mesh that does not divide": ({"mesh": {"fsdp": 3}}, r"config.mesh: fsdp=3 needs 3 devices, found 8"),
    "mesh with a rest that does not divide": ({"mesh": {"fsdp": -1, "tensor": 3}}, "a multiple of 3 devices, found 8"),
    "mesh of an axis that there is not": ({"mesh": {"expert": 8}}, "found the axes expert, expected some of data"),
    "axis that does not divide": (
        {"model.width": 12},
        r"embed/embedding: axis 1 of shape \(256, 12\) is no multiple of the 8 devices along fsdp; choose another",
    ),
    "rule that spreads nothing": ({"sharding": [("layer/.*", ("fsdp",))]}, "rule 0 'layer/.*' spreads no parameter"),
    "rule with too many axes": ({"sharding": [("norm/scale", ("fsdp", None))]}, r"norm/scale: found shape \(16,\)"),
    "batch": ({"batch_size": 12}, "config.batch_size=12 is no multiple of 8 .* use 8"),
    "too few examples": ({"batch_size": 128}, "found 64 examples, expected a batch of 128"),
    "model": ({"model.name": "mamba"}, "'mamba' is unknown; use one of decoder, resnet"),
    "field of the model": ({"model": {"name": "decoder", "wide": 3}}, "config.model: .*wide"),
    "data of another kind": (
        {"data": {"name": "digits"}},
        "'decoder' reads text data, but config.data.name 'digits' is image",
    ),
    "how": ({"compress.how": "hope"}, "'hope' is unknown; use one of project, simulate, nodes"),
    "optimizer": ({"optimizer.rate": 1.0}, "config.optimizer: 'rate' is unknown"),
    "warmup": ({"optimizer.warmup": 9}, "warmup=9 must be less than config.steps=4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_computed(name, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        train.Run(tiny(**changes), tmp_path)


def test_a_checkpoint_of_another_plan_is_refused(finished, tmp_path):
    folder, _ = finished("project")
    with pytest.raises(ValueError, match=r"another setting \(.*compress.sparsity: 0.8 -> 0.5"):
        train.run(tiny(**{"compress.sparsity": 0.5}), folder)
    other = train.Run(tiny(**{"compress.sparsity": 0.5}), folder)
    with (
        other.checkpoints() as checkpoints,
        pytest.raises(ValueError, match=r"layers/.*kernel: found .*in the plan, exp"),
    ):
        other.begin(checkpoints)
