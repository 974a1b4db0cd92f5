"""Run in a process of its own: ``checkpoint_worker.py save|restore|killed FOLDER``."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc


def state(devices, scale=1):
    """A state with one array spread over all devices, one of 4 bits, keys, and the rest wherever."""
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    w = scale * jnp.arange(64.0).reshape(16, 4)
    spread = {
        "w": w,
        "node": jc.formats.Masked(values=w.astype(jnp.bfloat16), mask=w % (3 * max(scale, 1)) == 0),
        "codes": (w % 16).astype(jnp.uint4),
        "signed": (w % 16 - 8).astype(jnp.int4),
        "narrow": w.astype(jnp.float8_e4m3fn),
        "keys": jax.random.split(jax.random.key(scale), 16),
    }
    return {
        "spread": jax.device_put(spread, rows),
        "copied": jax.device_put({"b": scale * jnp.ones(3)}, everywhere),
        "step": jnp.int32(7 * scale),
        "epoch": 3 * scale,
    }


def values(tree):
    tree = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def _is_key(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def main(what, folder):
    expected, fresh = state(jax.devices()), state(jax.devices(), scale=0)
    with jc.io.Checkpoints(folder) as checkpoints:
        if what == "save":
            checkpoints.save(1, expected)
        elif what == "killed":
            checkpoints.save(2, {**expected, "big": np.ones(1 << 25, np.float32)})
            while not any("2" in name for name in os.listdir(folder)):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            again = checkpoints.restore(fresh)
            for a, b in zip(values(again), values(expected), strict=True):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(jax.tree.leaves(again["spread"]), jax.tree.leaves(fresh["spread"]), strict=True):
                assert (a.dtype, a.sharding) == (b.dtype, b.sharding), (a.dtype, a.sharding, b.sharding)
            # What was free to move stays so, or it could not meet arrays on other devices under jit.
            assert not again["step"].committed
            jax.jit(lambda s: s["spread"]["w"] * s["step"])(again)
    print(len(jax.devices()), "ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
