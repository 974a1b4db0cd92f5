"""One of two processes that train one model: ``train_worker.py ADDRESS PROCESS FOLDER [STEPS]``."""

import sys

import jax

from experiments import runner, train
from experiments.configs import train_decoder


def config(steps):
    found = train_decoder.get_config("tiny")
    found.update({"steps": steps, "batch_size": 16, "log_every": 2, "eval_every": 0, "eval_batches": 1})
    found.update({"checkpoint": {"every": 2}, "optimizer": {"warmup": 1}, "compress": {"every": 2}})
    found.model.update({"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 32})
    found.data.options.update({"length": 8, "examples": 64})
    found.mesh = {"fsdp": -1}
    return found


def main(address, process, folder, *changes):
    jax.distributed.initialize(address, 2, int(process))
    chosen = config(4)
    if "wrong" in changes and process == "1":
        chosen.optimizer.rate = 1.0
    if "uneven" in changes:
        chosen.model.width = 12
    if "another plan" in changes:
        chosen.compress.sparsity = 0.5
    try:
        found = train.run(chosen, folder, signals=runner.Signals())
        print(f"loss {found.scores['loss']:.6f} of {jax.device_count()} devices")
    except ValueError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
