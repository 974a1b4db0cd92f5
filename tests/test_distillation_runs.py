"""The commands of distillation run whole on little data, continue, and write their tables."""

import dataclasses
import json

import pytest

from experiments.distillation import losses, studies

FEW = ["--config.seeds=1", "--config.steps=4"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_losses_are_compared_with_plain_training_and_the_command_continues(tmp_path, capsys):
    flags = [*FEW, "--config.network.steps=20", "--config.only=plain,soft targets,hints", f"--workdir={tmp_path}"]
    assert losses.main(flags) == 0
    found = {row["loss"]: row for row in rows_of(tmp_path)}
    assert list(found) == ["teacher", "cut", "plain", "soft targets", "hints"]
    assert found["plain"]["multiply_adds"] < found["teacher"]["multiply_adds"] / 10
    assert "soft targets" in (tmp_path / "table.md").read_text() and (tmp_path / "losses.png").exists()
    assert losses.main(flags) == 0 and "5 rows, 5 of them there" in capsys.readouterr().out


@pytest.mark.parametrize("study", ["born again", "mean teacher", "no data"])
def test_each_study_has_its_control(study, tmp_path):
    small = ["--config.examples=100", "--config.made=64", "--config.making=3", "--config.generations=2"]
    assert studies.main([*FEW, *small, f"--config.only={study}", f"--workdir={tmp_path}"]) == 0
    (row,) = rows_of(tmp_path)
    control = {"born again": "plain", "mean teacher": "labels alone", "no data": "noise"}[study]
    assert control in row["errors"] and all(0 <= error <= 100 for error in row["errors"].values())
    assert studies.PUBLISHED[study] in (tmp_path / "table.md").read_text()


def test_ten_images_are_learned_with_their_rates():
    config = dataclasses.replace(studies.Config(), distilled=2, inner=1)
    seen = studies.Class(config, studies.datasets.of("digits", None, config.data_options), 0)
    errors = studies.ten_images(seen)
    assert list(errors)[1::2] == ["learned, known start", "learned, any start"]


def test_an_unknown_study_is_refused(capsys):
    assert studies.main(["--config.only=telepathy"]) == 2
    assert "telepathy" in capsys.readouterr().err
