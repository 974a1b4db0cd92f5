"""Models of 7 and 70 billion parameters on 256 chips, planned on a machine that holds neither.

    python -m experiments.scale.large

Parameters are shapes. First what plans store and what a call costs, from shapes alone; then jobs are compiled for 256
devices that this process only pretends to have: a mask update, shared values, GPTQ of one layer, and a step of sparse
training. Nothing is run and no array is made. Rows are added to ``results/scale/large.jsonl``, never measured twice;
tables with the least times on some chips are written beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=256"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jcompress as jc
from experiments import tables
from experiments.models import llama
from experiments.scale import programs
from experiments.scale.chips import CHIPS
from experiments.training import meshes
from experiments.workdir import Row, Rows, write

RESULTS = Path(__file__).parent.parent.parent / "results" / "scale"
# Llama 2 (Touvron et al. 2023, arXiv:2307.09288).
MODELS = {
    "7B": llama.Config(32_000, 4096, 32, 32, 32, 128, 11_008, tied=False, longest=4096),
    "70B": llama.Config(32_000, 8192, 80, 64, 8, 128, 28_672, tied=False, longest=4096),
}
MESH = {"fsdp": 32, "tensor": 8}
DEVICES = math.prod(MESH.values())
RULES = (
    (".*/(q|k|v|gate|up)/kernel", ("fsdp", "tensor")),
    (".*/(out|down)/kernel", ("tensor", "fsdp")),
    ("embed/embedding", ("tensor", "fsdp")),
    ("head/kernel", ("fsdp", "tensor")),
)
KERNELS = "layers/.*/kernel"
BATCH, LENGTH = 64, 2048

PLANS = {
    "dense, bfloat16": None,
    "Int(bits=4, group_size=128)": jc.quantize.Int(bits=4, group_size=128),
    "Magnitude, 2:4": jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)),
    "2:4, then Int(bits=4)": jc.chain(jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), jc.quantize.Int(bits=4)),
    "KMeans(clusters=16)": jc.share.KMeans(clusters=16),
    "SVD, half of the numbers": jc.factorize.SVD(rank=0.5),
}
HALF = jc.prune.Magnitude(sparsity=0.5)
SHARED = jc.share.KMeans(clusters=16, iterations=10)
GPTQ = jc.quantize.GPTQ(bits=4, group_size=128)
PASSES = 12
"""Readings of all weights by a mask update, at worst (see ``results/benchmarks``)."""


def shapes(config: llama.Config, dtype: Any = jnp.float32) -> Any:
    """Parameters with their layers stacked, as shapes."""
    return jax.eval_shape(lambda: llama.init(jax.random.key(0), config, stacked=True, dtype=dtype))


def spread(tree: Any) -> Any:
    """The same over all devices."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * len(MESH))
    found = meshes.of_params(tree, RULES, mesh)
    return jc.rules.rebuild(
        tree, {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=found[path]) for path, x in jc.paths(tree)}
    )


def sizes(model: str) -> list[Row]:
    """What each plan stores, and what a token costs, from shapes alone."""
    config = MODELS[model]
    params = shapes(config, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    cost = jc.trace.cost(lambda p, t: llama.apply(p, t, config), params, tokens)
    rows = []
    for name, method in PLANS.items():
        start = time.process_time()
        plan = jc.plan(params, [(KERNELS, method), (".*", None)], layout=_stacks(params))
        small = jax.eval_shape(lambda p, plan=plan: jc.compress(p, plan), params)
        total = cost.compressed(small).total if method is not None else cost.total
        row = {"model": model, "job": "plan", "what": name, "stored_bytes": jc.nbits(small) // 8}
        row |= {"multiply_adds": total.compressed_multiply_adds / LENGTH, "seconds": time.process_time() - start}
        rows.append(row)
    return rows


def _stacks(params: Any) -> dict[str, jc.Layout]:
    return {p: jc.Layout(batch=(-3,), inputs=(-2,), outputs=(-1,)) for p, x in jc.paths(params) if x.ndim == 3}


# Each job gives a function, its arguments, which of them are donated, how often it is called, and for one device what
# it computes and reads at least: operations and bytes.


def mask_update(config: llama.Config) -> tuple:
    """The masks of one threshold for each kernel of each layer."""
    params = spread(shapes(config))
    plan = jc.plan(params, [(KERNELS, HALF), (".*", None)], layout=_stacks(params))
    weights = sum(x.size for path, x in jc.paths(params) if plan[path] is not None) / DEVICES
    call = lambda p: {path: x.mask for path, x in jc.paths(jc.compress(p, plan)) if plan[path] is not None}  # noqa: E731
    return call, (params,), (), 1, PASSES * weights, PASSES * 4 * weights


def shared_values(config: llama.Config) -> tuple:
    """Codebooks of 16 values, one for each layer of the gates."""
    params = spread(shapes(config))
    gate = {"gate": params["layers"]["mlp"]["gate"]["kernel"]}
    plan = jc.plan(gate, [(".*", SHARED)], layout=_stacks(gate))
    weights = gate["gate"].size / DEVICES
    return lambda p: jc.compress(p, plan), (gate,), (), 1, 10 * 16 * 2 * weights, 10 * 4 * weights


def rounding(config: llama.Config) -> tuple:
    """GPTQ of the gate of one layer, from its Gram matrix."""
    whole = spread(shapes(config))["layers"]["mlp"]["gate"]["kernel"]
    mesh, (_, n, m) = whole.sharding.mesh, whole.shape
    w = {"gate": jax.ShapeDtypeStruct((n, m), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor")))}
    plan = jc.plan(w, [("gate", GPTQ)])
    x = jax.ShapeDtypeStruct((BATCH, n), jnp.float32, sharding=NamedSharding(mesh, P()))
    stats = jax.eval_shape(lambda p, x: jc.calibrate(lambda p, x: x @ p["gate"], p, [x], plan=plan), w, x)
    flops = 4 * n**3 / 3 + 2 * n**2 * m / DEVICES
    return (
        lambda p, s: jc.compress(p, plan, stats=s),
        (w, stats),
        (),
        config.layers,
        flops,
        4 * (n**2 + n * m / DEVICES),
    )


def training(config: llama.Config) -> tuple:
    """A step of AdamW that holds 2:4 patterns, layers recomputed in the backward pass, products in bfloat16."""
    params = spread(shapes(config))
    mesh = params["head"]["kernel"].sharding.mesh
    plan = jc.plan(
        params, [(KERNELS, jc.prune.Magnitude(pattern=jc.prune.NM(2, 4))), (".*", None)], layout=_stacks(params)
    )
    tx = optax.chain(optax.adamw(1e-4), jc.project(plan, every=100))
    state = jax.eval_shape(tx.init, params)
    named = dict(jc.paths(params))
    where = meshes.of_state(state, {p: x.sharding for p, x in named.items()}, named, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32, sharding=NamedSharding(mesh, P("fsdp", None)))

    def loss(p: Any, tokens: jax.Array) -> jax.Array:
        logits = _logits(p, tokens[:, :-1], config, mesh)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(p: Any, state: Any, tokens: jax.Array) -> tuple:
        updates, state = tx.update(jax.grad(loss)(p, tokens), state, p)
        return optax.apply_updates(p, updates), state

    weights = sum(x.size for x in named.values())
    flops = 8 * weights * BATCH * LENGTH + 16 * config.layers * config.width * BATCH * LENGTH**2
    return step, (params, state, tokens), (0, 1), 1, flops / DEVICES, 40 * weights / DEVICES


def _logits(params: Any, tokens: jax.Array, config: llama.Config, mesh: Any) -> jax.Array:
    """The model with examples spread along fsdp, and each layer's kernels gathered along it when their turn comes."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def held(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def gathered(keys: Any, x: jax.Array) -> jax.Array:
        rows = any(name in jax.tree_util.keystr(keys) for name in ("out", "down"))
        return held(x, *(("tensor", None) if rows else (None, "tensor"))) if x.ndim == 2 else x

    @jax.checkpoint
    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        layer = jax.tree_util.tree_map_with_path(gathered, jax.tree.map(lambda w: w.astype(x.dtype), layer))
        return held(llama.block(layer, x, config, positions)[0], "fsdp", None, None), None

    x = held(llama.embed(params, tokens, jnp.bfloat16), "fsdp", None, None)
    return held(llama.head(params, jax.lax.scan(step, x, params["layers"])[0], config), "fsdp", None, "tensor")


JOBS: dict[str, Callable[[llama.Config], tuple]] = {
    "mask update": mask_update,
    "k-means, gates": shared_values,
    "GPTQ, gates": rounding,
    "training step": training,
}


def measure(model: str, job: str) -> Row:
    """Compile one job and read its program; of a job that is called several times, the sums."""
    start = time.process_time()
    call, args, donate, calls, flops, nbytes = JOBS[job](MODELS[model])
    mesh = next(x.sharding.mesh for x in jax.tree.leaves(args) if isinstance(x.sharding, NamedSharding))
    with jax.set_mesh(mesh):
        program, _ = programs.compiled(call, *args, donate=donate)
    return {
        "model": model,
        "job": job,
        "what": f"{calls} calls" if calls > 1 else "",
        "received_bytes": calls * program.traffic.nbytes,
        "by_kind": {name: round(calls * x) for name, x in program.traffic.by_kind.items()},
        "in_loops": program.traffic.loops,
        "arguments": program.arguments,
        "temporary": program.temporary,
        "results": program.results,
        "flops": calls * flops,
        "read_bytes": calls * nbytes,
        "seconds": time.process_time() - start,
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def finish(rows: Sequence[Row], path: Path) -> str:
    """Write the tables; return them."""
    plans = [["model", "plan", "stored", "multiply-adds a token", "CPU time"]]
    jobs = [["model", "job", "received", "arguments", "temporary", *(f"least, {c.name}" for c in CHIPS), "CPU time"]]
    for row in rows:
        if row["job"] == "plan":
            what = (f"{row['stored_bytes'] / 1e9:.2f} GB", f"{row['multiply_adds'] / 1e9:.2f}G")
            plans.append([row["model"], row["what"], *what, f"{row['seconds']:.1f} s"])
            continue
        least = [_least(c.seconds(row["flops"], row["read_bytes"], row["received_bytes"])) for c in CHIPS]
        held = (_giga(row[name]) for name in ("arguments", "temporary"))
        received = _giga(row["received_bytes"]) + (" a turn" if row["in_loops"] else "")
        jobs.append([row["model"], row["job"], received, *held, *least, f"{row['seconds']:.0f} s"])
    text = f"{tables.markdown(plans, (0, 1))}\n\n{tables.markdown(jobs, (0, 1))}\n"
    write(path, text)
    return text


def _least(times: dict[str, float]) -> str:
    kind, seconds = max(times.items(), key=lambda item: item[1])
    shown = f"{seconds:.2g} s" if seconds >= 1 else f"{1e3 * seconds:.2g} ms"
    return f"{shown} ({kind})"


def _giga(nbytes: float) -> str:
    power = max(0, min(3, int(math.log10(max(nbytes, 1)) // 3)))
    return f"{nbytes / 1000**power:.3g} {('B', 'KB', 'MB', 'GB')[power]}"


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--jobs", nargs="+", default=["plan", *JOBS], choices=["plan", *JOBS])
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.results / "large.jsonl", ("model", "job", "what"))
    for model in options.models:
        for job in options.jobs:
            if not any((row["model"], row["job"]) == (model, job) for row in rows):
                for row in sizes(model) if job == "plan" else [measure(model, job)]:
                    rows.add(row)
                    print(json.dumps(row), flush=True)
    print(finish(list(rows), options.results / "large.md"))


if __name__ == "__main__":
    main()
