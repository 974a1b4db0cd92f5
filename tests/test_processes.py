"""Two processes of one cluster, whose arrays no process holds whole; each case is a function of processes_worker."""

import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from processes_worker import stored_tree

import jcompress as jc

WORKER = pathlib.Path(__file__).parent / "processes_worker.py"
LONG_CASES = ["checkpoints", "verbs"]


def run_together(case, folder, count=2, seconds=300):
    """Run a case in processes of one cluster. All end, or all are ended."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(WORKER), case, str(folder), str(port), str(count)]
    runs = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    try:
        said = [run.communicate(timeout=seconds) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    for run, (out, err) in zip(runs, said, strict=True):
        assert run.returncode == 0 and "passed" in out, err[-4000:]


def test_what_computes_on_the_host_is_refused_by_all(tmp_path):
    run_together("on_hosts", tmp_path)


def test_files_of_two_processes_are_those_of_one(tmp_path):
    (tmp_path / "shared").mkdir()
    run_together("storage", tmp_path / "shared")
    tree = jax.tree.map(lambda x: x, stored_tree())  # with its keys in order, as JAX returns dictionaries
    for coded in (False, True):
        jc.save(tmp_path / "alone", tree, metadata="x", coded=coded)
        assert (tmp_path / "shared" / f"together {coded}").read_bytes() == (tmp_path / "alone").read_bytes()


@pytest.mark.parametrize("case", LONG_CASES)
def test_two_processes(case, tmp_path):
    run_together(case, tmp_path, seconds=600)


def test_what_hangs_is_ended(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run_together("storage", tmp_path, count=3, seconds=0.5)
