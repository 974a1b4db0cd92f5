"""The launch recipes, run with programs in the place of a cluster's: every flag is there, and every shape works."""

import os
import shlex
import subprocess

import pytest
from test_project_files import ROOT

pytest.importorskip("ml_collections")

from absl import flags

from experiments import train
from experiments.training import meshes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*load_module:DeprecationWarning"
)  # of ml_collections, up to Python 3.11

# What the commands of a cluster do here: gcloud and srun run on this machine, and python says how it was called.
PROGRAMS = {
    "gcloud": 'for x in "$@"; do case "$x" in --command=*) bash -c "${x#--command=}";; esac; done',
    "srun": 'shift; "$@"; exit 143',
    "scontrol": 'echo "$@" >> "$HOME/requeued"',
    "python": 'printf "%s\\n" "$@" > "$HOME/called"',
}
RECIPES = {
    "tpu_pod.sh": ({"TPU": "slice", "ZONE": "here", "SHARED": "/mnt/shared"}, 128, 0),
    "slurm.sh": ({"SLURM_JOB_ID": "7", "SHARED": "/shared"}, 16, 143),
}


@pytest.fixture
def called(tmp_path):
    """Runs a recipe; the arguments that python gets."""
    (tmp_path / "jcompress").symlink_to(ROOT)
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def run(name):
        given, _, code = RECIPES[name]
        environ = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **given}
        script = ["bash", str(ROOT / "experiments" / "launch" / name)]
        done = subprocess.run(script, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return (tmp_path / "called").read_text().splitlines()

    return run


def parsed(arguments):
    """The flags of the training command, as it would read them."""
    values = flags.FlagValues()
    train.define(values, arguments)
    assert values(arguments) == arguments[:1]
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_calls_the_command_with_flags_and_shapes_that_work(called, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    module, *arguments = called(name)[1:]
    assert module == "experiments.train"
    values = parsed(["train", *arguments])
    assert values.distributed and values.workdir.startswith(RECIPES[name][0]["SHARED"])
    parts = train.Parts(values.config, meshes.make_mesh(values.config.mesh, RECIPES[name][1]))
    assert values.config.mesh.tensor > 1 and "6,981,685,248 parameters" in str(parts)
    assert meshes.bytes_on_a_device(parts.shapes, parts.shardings) < 2**33


def test_a_job_that_was_stopped_goes_back_to_the_queue(called, tmp_path):
    called("slurm.sh")
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_every_recipe_is_tried():
    assert sorted(path.name for path in (ROOT / "experiments" / "launch").iterdir()) == sorted(RECIPES)


def test_a_flag_that_there_is_not_is_refused():
    with pytest.raises(flags.UnrecognizedFlagError, match="tensors"):
        parsed(shlex.split("train --tensors=4"))
    with pytest.raises(AttributeError, match="tensors"):
        parsed(shlex.split("train --config=experiments/configs/train_decoder.py --config.mesh.tensors=4"))
