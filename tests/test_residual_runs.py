"""Experiments on ResNets that were trained elsewhere, on random ones and a few random images."""

import json

import jax
import numpy as np
import pytest

import jcompress as jc
from experiments import data as datasets
from experiments import lighter, permute
from experiments.codec import networks as codec
from experiments.distillation import losses
from experiments.families import ways
from experiments.models import resnet
from experiments.quantization import networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for name, size in (("data_batch_1.bin", 80), ("test_batch.bin", 20)):
        records = rng.integers(0, 256, (size, 3073), np.uint8)
        records[:, 0] %= 10
        records.tofile(path / name)
    for depth, seed in ((14, 0), (8, 1)):
        params, statistics = resnet.init(jax.random.key(seed), depth, 8)
        arrays = {name.replace("/", "."): np.asarray(x) for name, x in (params | statistics).items()}
        np.savez(path / f"resnet{depth}_cifar10.npz", **arrays)
    return path


def test_images_are_moved_in_a_black_frame_and_flipped():
    x = np.random.default_rng(0).uniform(0.1, 1, (64, 32, 32, 3)).astype(np.float32)
    found = resnet.augmented(x, 0)
    assert found.shape == x.shape and found.min() == 0
    for before, after in zip(x, found, strict=True):
        inside = after[..., 0] > 0  # the part of the image that is seen, at one of 81 places, one of two ways round
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        seen = after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = seen.shape[:2]
        ways = [
            np.array_equal(image[a : a + height, b : b + width], seen)
            for image in (before, before[:, ::-1]) for a in range(33 - height) for b in range(33 - width)
        ]  # fmt: skip
        assert any(ways) and min(height, width) >= 28


def test_a_teacher_of_stages_teaches_its_cut_self_and_another_network(folder, tmp_path):
    config = ["data=cifar10", "network.model=resnet14", "seeds=1", "steps=2", "batch_size=8", "network.test=10"]
    flags = [f"--config.{x}" for x in config] + [f"--data_dir={folder}", "--config.only=plain,flow,attention"]
    assert losses.main([*flags, "--config.share=0.5", f"--workdir={tmp_path / 'cut'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cut" / "results.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == ["teacher", "cut", "plain", "attention", "flow"]
    assert rows[1]["multiply_adds"] == pytest.approx(rows[0]["multiply_adds"] / 2, rel=0.1)
    assert losses.main([*flags, "--config.student=resnet14", f"--workdir={tmp_path / 'own'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "own" / "results.jsonl").read_text().splitlines()]
    assert len({row["multiply_adds"] for row in rows}) == 1 and len({row["test_bits"] for row in rows}) == 5


@pytest.mark.parametrize("blended", [0, 1])
def test_a_network_with_fewer_multiply_adds_is_taught_by_itself(folder, tmp_path, monkeypatch, blended):
    monkeypatch.setattr(ways, "LADDER", (0.3,))
    config = ["model=resnet8", "fewer=1.5", "epochs=0.1", "batch_size=8", "test=10", f"blended={blended}"]
    flags = [f"--config.{x}" for x in config] + [f"--data_dir={folder}", f"--workdir={tmp_path / 'run'}"]
    assert lighter.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [row["way"] for row in rows] == ["dense", "chosen CP", "units"]
    for row in rows[1:]:
        assert row["multiply_adds"] <= 0.71 * rows[0]["multiply_adds"]
        assert row["test_bits"] != row["test_bits_before"]
    assert "| chosen CP |" in (tmp_path / "run" / "table.md").read_text()
    (tmp_path / "again").mkdir()
    flags[-1] = f"--workdir={tmp_path / 'again'}"
    assert lighter.main([*flags, "--config.ways=('CP',)"]) == 2


def test_an_image_has_so_much_of_another_at_most():
    x = np.random.default_rng(0).normal(size=(16, 4, 4, 3)).astype(np.float32)
    found = lighter.blended(x, 0.25, 0)
    assert found.dtype == x.dtype and not np.array_equal(found, x)
    nearest = [min(np.linalg.norm(y - z) for z in x) / np.linalg.norm(y) for y in found]
    assert max(nearest) < 0.5
    np.testing.assert_array_equal(lighter.blended(x, 0.0, 0), x)


def test_few_bits_are_measured_with_and_without_activations(folder):
    bench = networks.Bench(folder / "resnet8_cifar10.npz", str(folder), 20, 40)
    rows = networks.run(bench, [8, 3])
    ways, activations = [*networks.METHODS], ["GPTQ, static activations", "GPTQ, dynamic activations"]
    wide = [way for way in ways if way != "trellis"]
    assert [row["way"] for row in rows] == ["dense", *wide, *activations, *ways, *activations]
    assert all(3 * row["coded"] < rows[0]["bytes"] and row["coded"] < row["bytes"] for row in rows[1:])
    assert all(0 <= row["error"] <= 100 for row in rows)
    assert networks.table(rows).count("\n") == len(rows) + 1


def test_biases_are_trained_towards_the_dense_network_and_kernels_are_held(folder):
    network = codec.ResNet(folder / "resnet8_cifar10.npz", str(folder), 40, 20)
    tree = network.compressed(1.0, 0.1, 0, dict.fromkeys(network.leaves(), 1.0))
    tuned = network.tuned(tree, 20)
    assert jax.tree.structure(tuned) == jax.tree.structure(tree)
    dense, moved = jc.materialize(tree), jc.materialize(tuned)
    assert all((moved[path] == dense[path]).all() for path in network.leaves())
    images = resnet.augmented(network.train[:40], 0)
    wanted = network.apply(network.params, images)
    before, after = (jc.distill.soft_targets(network.apply(x, images), wanted, temperature=1.0) for x in (dense, moved))
    assert after < before


def test_another_order_of_units_changes_words_and_not_the_network(folder):
    tuned = permute.tuner("resnet14", str(folder), 10, 1, 2)
    bench = permute.Bench(folder / "resnet14_cifar10.npz", datasets.load("cifar10", folder), 4, 10, tuned)
    rows = permute.run(bench)
    kinds = ["as it is", "permuted", "permuted where words gain", "random 0", "random 1", "random 2"]
    assert [row["order"] for row in rows] == kinds
    assert all(row["outputs_moved"] < 1e-5 and row["bytes"] == rows[0]["bytes"] for row in rows)
    assert rows[0]["groups"] and len({json.dumps(row["layers"]) for row in rows}) >= 5
    assert all(len(row["tuned"]) == 2 and all(0 <= x <= 100 for x in row["tuned"]) for row in rows)
    assert "| permuted |" in permute.table(rows) and "| restated | tuned |" in permute.table(rows)
