"""What every verb moves between devices and takes in memory, for parameters sharded in three ways.

    python -m experiments.scale.verbs

Two kernels, (512, 1024) and (1024, 512), and a bias lie on 8 simulated devices: their first axis spread (FSDP), the
axis that a product splits (tensor parallel), or both. Each verb is compiled for axes that are automatic and explicit,
and its program is read: nothing is run. Rows are added to ``results/scale/verbs.jsonl`` and never measured twice; the
table is written beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jcompress as jc
from experiments import tables
from experiments.scale import programs
from experiments.workdir import Row, Rows, write

RESULTS = Path(__file__).parent.parent.parent / "results" / "scale"
SHAPES = {"up": (512, 1024), "bias": (1024,), "down": (1024, 512)}
SHARDINGS: dict[str, dict[str, P]] = {
    "FSDP": {"up": P("data", None), "bias": P(), "down": P("data", None)},
    "tensor": {"up": P(None, "model"), "bias": P("model"), "down": P("model", None)},
    "both": {"up": P("data", "model"), "bias": P("model"), "down": P("model", "data")},
}
MESHES = {"FSDP": (8, 1), "tensor": (1, 8), "both": (4, 2)}
AXES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
KEYS = ("verb", "method", "sharding", "axes")

M, Q, F = jc.prune.Magnitude, jc.quantize, jc.factorize
COMPRESSED = {
    "Magnitude": M(sparsity=0.8),
    "Magnitude, global": M(sparsity=0.8, scope="global"),
    "Magnitude, 2:4": M(pattern=jc.prune.NM(2, 4)),
    "Int": Q.Int(bits=4, group_size=64),
    "Magnitude, Int": jc.chain(M(sparsity=0.8), Q.Int(bits=4)),
    "KMeans": jc.share.KMeans(clusters=16, iterations=10),
    "KMeans, global": jc.share.KMeans(clusters=16, iterations=10, scope="global"),
    "SVD": F.SVD(rank=32),
    "SVD, randomized": F.SVD(rank=32, randomized=True),
    "Wanda": jc.prune.Wanda(sparsity=0.5),
    "GPTQ": Q.GPTQ(bits=4, group_size=64),
    "SparseGPT": jc.prune.SparseGPT(sparsity=0.5),
}
WHY = {
    "SVD": "an exact decomposition is no sum over shards: one gather of the array",
    "GPTQ": "each device takes all inputs of its outputs; codes stay so inside `jit`, and go back outside",
    "SparseGPT": "as GPTQ",
    "Wanda": "scores are compared within an output: where inputs are spread, thresholds of all outputs are summed",
    "SVD, randomized": "a sketch of a few columns more than the rank is orthogonalized whole, twice",
    "KMeans": "histograms of a fixed number of bins are summed, the less for each parameter the more there are",
    "KMeans, global": "as KMeans",
    "calibrate": "inputs meet all their weights, and the statistic is summed over the batch",
}
RULES = {"SET": jc.prune.dynamic.SET(), "RigL": jc.prune.dynamic.RigL(stop=10_000)}
TRAINED = ("Magnitude", "Magnitude, global", "Int", "KMeans, global")


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """Two layers; where axes are explicit the last product says where it goes."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    explicit = bool(getattr(mesh, "explicit_axes", ()))
    rows = {"out_sharding": NamedSharding(mesh, P("data", None))} if explicit else {}
    hidden = {"out_sharding": NamedSharding(mesh, P("data", "model"))} if explicit else {}
    return jnp.matmul(jax.nn.relu(jnp.matmul(x, params["up"], **hidden) + params["bias"]), params["down"], **rows)


def shapes(sharding: str, axes: str) -> tuple[dict[str, Any], Any]:
    """Parameters and a batch, as shapes with shardings."""
    mesh = jax.make_mesh(MESHES[sharding], ("data", "model"), axis_types=(AXES[axes],) * 2)
    specs = SHARDINGS[sharding]

    def struct(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    return {name: struct(shape, specs[name]) for name, shape in SHAPES.items()}, struct((512, 512), P("data", None))


def verbs(sharding: str, axes: str) -> Iterator[tuple[str, str, Callable[[], tuple]]]:
    """``(verb, method, make)``; ``make`` gives a function and its arguments."""
    params, x = shapes(sharding, axes)
    plans = {name: jc.plan(params, [("up|down", m), (".*", None)]) for name, m in COMPRESSED.items()}
    for name, plan in plans.items():
        yield "compress", name, lambda plan=plan: _compress(plan, params, x)
    for name in TRAINED:
        yield "project", name, lambda plan=plans[name]: _project(plan, params)
        yield "simulate", name, lambda plan=plans[name]: (lambda p: jc.simulate(p, plan), (params,))
    for name, rule in RULES.items():
        yield "sparse training", name, lambda rule=rule: _sparse(rule, plans["Magnitude"], params)
    for name in ("Magnitude, Int", "KMeans", "SVD"):
        yield "materialize", name, lambda plan=plans[name]: (jc.materialize, (_nodes(plan, params),))
    yield "calibrate", "Gram matrices", lambda: (_calibrate(plans["GPTQ"]), (params, x))


def _calibrate(plan: jc.Plan) -> Callable:
    return lambda p, x: jc.calibrate(mlp, p, [x], plan=plan)


def _compress(plan: jc.Plan, params: Any, x: Any) -> tuple:
    if not any("stats" in need for need in plan["up"].needs):
        return lambda p: jc.compress(p, plan, key=jax.random.key(0)), (params,)
    stats = jax.eval_shape(_calibrate(plan), params, x)
    return lambda p, s: jc.compress(p, plan, stats=s), (params, stats)


def _project(plan: jc.Plan, params: Any) -> tuple:
    return _updated(jc.project(plan), params)


def _sparse(rule: Any, plan: jc.Plan, params: Any) -> tuple:
    return _updated(jc.prune.dynamic.sparse(optax.adamw(1e-3), rule, plan, key=jax.random.key(0)), params)


def _updated(tx: optax.GradientTransformation, params: Any) -> tuple:
    found = jax.jit(tx.init).lower(params).compile().output_shardings
    state = jax.tree.map(_struct, jax.eval_shape(tx.init, params), found)
    return lambda g, s, p: tx.update(g, s, p), (params, state, params)


def _nodes(plan: jc.Plan, params: Any) -> Any:
    call = lambda p: jc.compress(p, plan)  # noqa: E731
    found = jax.jit(call).lower(params).compile().output_shardings
    return jax.tree.map(_struct, jax.eval_shape(call, params), found)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def measure(verb: str, method: str, sharding: str, axes: str, make: Callable[[], tuple]) -> Row:
    """One row of the table."""
    params, _ = shapes(sharding, axes)
    with jax.set_mesh(params["up"].sharding.mesh):
        call, args = make()
        program, out = programs.compiled(call, *args)
    size = sum(x.size for x in params.values())
    shard = sum(4 * _local(x) for x in params.values())
    return {
        "verb": verb,
        "method": method,
        "sharding": sharding,
        "axes": axes,
        "bytes_per_parameter": round(8 * program.traffic.nbytes / size, 4),
        "by_kind": {name: round(x) for name, x in program.traffic.by_kind.items()},
        "in_loops": program.traffic.loops,
        "gathered": round(program.traffic.largest / (512 * 1024), 4),
        "temporary_over_shard": round(program.temporary / shard, 3),
        "kept": _kept(call, args, out, params),
    }


def _local(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))


def _kept(call: Callable, args: tuple, out: Any, params: Any) -> bool:
    """Whether all results of the size of a kernel are spread as it is."""
    found = zip(jax.tree.leaves(jax.eval_shape(call, *args)), jax.tree.leaves(out), strict=True)
    wanted = {x.shape: x.sharding for x in params.values()}
    return all(
        there.is_equivalent_to(wanted[x.shape], x.ndim) for x, there in found if x.shape in wanted and x.ndim > 1
    )


def finish(rows: Sequence[Row], path: Path) -> str:
    """Write the table, one line a verb and method; return it."""
    found = {tuple(row[key] for key in KEYS): row for row in rows}
    columns = [(s, a) for s in SHARDINGS for a in AXES if any((x["sharding"], x["axes"]) == (s, a) for x in rows)]
    head = ["verb", "method", *(f"{s}, {a}" for s, a in columns), "why"]
    cells = [head]
    for verb, method in dict.fromkeys((row["verb"], row["method"]) for row in rows):
        line = [_cell(found.get((verb, method, s, a))) for s, a in columns]
        own = [x for x in found.values() if (x["verb"], x["method"]) == (verb, method)]
        moves = any(x["gathered"] >= 0.1 or x["bytes_per_parameter"] >= 1 for x in own)
        why = WHY.get(method, WHY.get(verb, "")) if moves else ""
        cells.append([verb, method, *line, why])
    text = tables.markdown(cells, (0, 1, len(head) - 1)) + "\n"
    write(path, text)
    return text


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    turns = "/turn" if row["in_loops"] else ""
    gathered = f", {row['gathered']:.2g} of a kernel" if row["gathered"] >= 0.1 else ""
    lost = "" if row["kept"] else ", not kept"
    return f"{row['bytes_per_parameter']:.3g} B{turns}, {row['temporary_over_shard']:.2g}x{gathered}{lost}"


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="a text that verb, method or sharding hold")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.results / "verbs.jsonl", KEYS)
    known = {tuple(row[key] for key in KEYS) for row in rows}
    for axes in AXES:
        for sharding in SHARDINGS:
            for verb, method, make in verbs(sharding, axes):
                key = (verb, method, sharding, axes)
                if key not in known and options.only in " ".join(key):
                    row = measure(*key, make)
                    rows.add(row)
                    print(json.dumps(row), flush=True)
    print(finish(list(rows), options.results / "verbs.md"))


if __name__ == "__main__":
    main()
