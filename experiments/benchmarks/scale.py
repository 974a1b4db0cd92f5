"""Training steps spread over 8 devices, compile times of deep transformers, and a tree of very many leaves.

    python -m experiments.benchmarks.scale

Steps of the scripted training run are paired: the dense one against the same with ``project`` or ``simulate``, under
the same shardings, on 8 simulated devices, by CPU seconds, which other jobs of the machine do not count in. Compiling
and the many leaves are measured once, in CPU seconds and by the wall, nothing of them cached.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments.benchmarks import timing
from experiments.configs import train_decoder
from experiments.training import meshes, steps, tasks
from experiments.training.pipeline import placed

NEVER = 1 << 30
KERNELS = train_decoder.KERNELS
MESHES = {"fsdp 8": {"fsdp": 8}, "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2}}


# ---- Steps -----------------------------------------------------------------------------------------------------------


class Side:
    """One side of a comparison: a state of its own, donated from step to step; calling it takes one step."""

    def __init__(self, args: argparse.Namespace, mesh: Any, rules: list, how: str, every: int = NEVER) -> None:
        task = tasks.build(model(args, args.depth))
        shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
        spread = meshes.of_params(shapes, train_decoder.sharding(tied=True), mesh)
        plan = jc.plan(meshes.abstract(shapes, jc.rules.rebuild(shapes, spread)), rules)
        trainer = steps.Trainer(task, plan, how, steps.make_optimizer({}, NEVER), every)
        state = jax.eval_shape(trainer.init)
        places = meshes.of_state(state, spread, jc.rules.leaves(shapes), mesh)
        self.state = jax.jit(trainer.init, out_shardings=places)()
        self.step = jax.jit(trainer.step, donate_argnums=0, out_shardings=(places, None))
        tokens = np.random.default_rng(0).integers(0, 256, (args.batch, args.length + 1)).astype(np.int32)
        arrays = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
        self.batch = {name: placed(x, 1, meshes.of_batch(mesh)) for name, x in arrays.items()}

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["loss"]


def model(args: argparse.Namespace, depth: int, stacked: bool = True) -> dict[str, Any]:
    """The fields of a decoder."""
    width, heads = args.width, max(args.width // 32, 2)
    sizes = {"width": width, "heads": heads, "kv_heads": heads // 2, "head_dim": width // heads, "hidden": 3 * width}
    return {"name": "decoder", "layers": depth, "stacked": stacked, "remat": False, "dtype": "float32", **sizes}


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    magnitude = [(KERNELS, jc.prune.Magnitude(sparsity=0.8))]
    integers = [(KERNELS, jc.quantize.Int(bits=8))]
    for name, sizes in MESHES.items() if "steps" in args.parts else ():
        side = functools.partial(Side, args, meshes.make_mesh(sizes))
        others: dict[str, tuple[Callable, str]] = {
            "dense again": (functools.partial(side, [], "simulate"), ""),
            "project, no refit due": (functools.partial(side, magnitude, "project"), "<= 1.1"),
            "project, a refit each step": (functools.partial(side, magnitude, "project", 1), ""),
            "simulate, 8 bits": (functools.partial(side, integers, "simulate"), "<= 1.1"),
        }
        for what, (make, target) in others.items():
            both = functools.partial(_pair, side, make)
            yield timing.Case(f"{name}: {what}", "dense", "with", both, target, clock=time.process_time)


def _pair(side: Callable, make: Callable) -> tuple:
    return side([], "simulate"), make()


# ---- Compiling, and many leaves --------------------------------------------------------------------------------------


def once(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a function gives, and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(function())
    return found, {"cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.perf_counter() - wall, 2)}


def compiling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Lowering and compiling for one device, of deep decoders whose layers are stacked or not."""
    rows = []
    for name, stacked in (("scanned", True), ("unrolled", False)):
        task = tasks.build(model(args, args.layers, stacked))
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
        plan = jc.plan(params, [(KERNELS, jc.prune.Magnitude(sparsity=0.8))])
        tokens = jax.ShapeDtypeStruct((1, 2, args.length), jnp.int32)
        optimizer = optax.adamw(1e-3)
        for what, rules in (("dense step", []), ("step with project", [(KERNELS, jc.prune.Magnitude(sparsity=0.8))])):
            trainer = steps.Trainer(task, jc.plan(params, rules), "project" if rules else "simulate", optimizer, 100)
            given = jax.eval_shape(trainer.init), {"x": tokens, "y": tokens}
            rows.append({"layers": args.layers, "model": name, "what": what, **_compiled(trainer.step, *given)})
        compress = functools.partial(jc.compress, plan=plan)
        rows.append({"layers": args.layers, "model": name, "what": "compress", **_compiled(compress, params)})
        print(rows[-3:], flush=True)
    return rows


def _compiled(function: Callable, *given: Any) -> dict[str, float]:
    return once(lambda: jax.jit(function).lower(*given).compile() and None)[1]


def leaves(args: argparse.Namespace) -> list[dict[str, Any]]:
    """So many leaves, half of them kernels, planned and compressed."""
    kernel = jnp.arange(256.0).reshape(16, 16)
    params = {f"layer{i}": {"kernel": kernel + i, "scale": jnp.ones(16)} for i in range(args.leaves // 2)}
    rules = [(".*/kernel", jc.prune.Magnitude(sparsity=0.5)), (".*", None)]
    plan, planned = once(lambda: jc.plan(params, rules))
    small, compressed = once(lambda: jc.compress(params, plan))
    bits, counted = once(lambda: jc.nbits(small))
    if any(int(layer["kernel"].mask.sum()) != 128 for layer in list(small.values())[::1000]):
        raise AssertionError("a mask keeps another number than half")
    print(f"{bits / 8e6:.1f} MB stored", flush=True)
    times = {"plan": planned, "compress": compressed, "nbits": counted}
    print(times, flush=True)
    return [{"leaves": args.leaves, "what": what, **found} for what, found in times.items()]


def about(args: argparse.Namespace) -> dict[str, Any]:
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        parts = {"leaves": leaves, "compiling": compiling}
        return {f"seconds_of_{name}": measure(args) for name, measure in parts.items() if name in args.parts}
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def on_eight_devices(argv: Sequence[str]) -> None:
    """Start the module anew on 8 simulated devices, unless that is how it runs."""
    count = "--xla_force_host_platform_device_count=8"
    if count not in os.environ.get("XLA_FLAGS", ""):
        environ = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}", "JAX_PLATFORMS": "cpu"}
        os.execve(sys.executable, [sys.executable, "-m", "experiments.benchmarks.scale", *argv], environ)


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "parts": (timing.Names(("steps", "leaves", "compiling")), "which of them"),
        "width": (128, "of the decoder"),
        "depth": (2, "its layers, for steps"),
        "layers": (32, "its layers, for compiling"),
        "batch": (16, "texts"),
        "length": (64, "of a text, in bytes"),
        "leaves": (20_000, "of the tree of many"),
    }
    timing.run("scale", __doc__, cases, options, argv, pairs=7, about=about)


if __name__ == "__main__":
    on_eight_devices(sys.argv[1:])
    main()
