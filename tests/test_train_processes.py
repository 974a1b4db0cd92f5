"""Two processes of ``jax.distributed`` train one model whose arrays neither holds whole."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from test_project_files import ROOT

pytest.importorskip("grain")

WORKER = pathlib.Path(__file__).with_name("train_worker.py")


def together(folder, *changes):
    """What both print."""
    done = started(folder, *changes)
    if any("Gloo context initialization failed" in error for _, _, error in done):
        # It waits for its peer for 30 seconds, and one compiled longer; now both find their programs in the cache.
        done = started(folder, *changes)
    assert [code for code, _, _ in done] == [0, 0], "\n".join(error for _, _, error in done)
    # Collectives print lines of their own.
    return [next(line for line in out.splitlines() if line.startswith(("loss", "refused"))) for _, out, _ in done]


def started(folder, *changes):
    """Both processes to their end: exit code, output and errors of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    commands = [[sys.executable, str(WORKER), address, str(i), str(folder), *changes] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environ, cwd=ROOT, **pipes) for command in commands]
    try:
        done = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, done, strict=True)]


def test_two_processes_train_one_model(tmp_path):
    found = together(tmp_path)
    assert found[0] == found[1] and found[0].endswith("of 8 devices")
    assert json.loads((tmp_path / "record.json").read_text())["finished"]
    assert (tmp_path / "model.jc").stat().st_size > 0
    for change, said in (("uneven", "embed/embedding: axis 1 of shape (256, 12)"), ("another plan", "another setting")):
        refused = together(tmp_path if change == "another plan" else tmp_path / "uneven", change)
        assert all(text.startswith("refused:") for text in refused) and any(said in text for text in refused), refused
    refused = together(tmp_path / "other", "wrong")
    assert refused[0] == "refused: process 1 of 2 failed; its own message says why"
    assert refused[1].startswith("refused: config.optimizer: 'rate' is unknown")
