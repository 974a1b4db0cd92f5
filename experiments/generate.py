"""Generating text from a decoder whose parameters are nodes: prefill and decoding with a cache of keys and values.

    python -m experiments.generate                # random parameters in the shapes of SmolLM2-135M
    python -m experiments.generate --file=SmolLM2-135M-Instruct.Q4_1.gguf --prompt="The capital of France is"

The dense function, nodes of 8 and of 4 bits, and these packed, take turns: tokens a second at batch 1, each beside the
dense function in the same run, and what its arrays take in memory. ``--cache`` keeps keys and values in 8 or 4 bits.
Where ``llama_cpp`` can be imported and ``--file`` is given, it decodes the same file in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments import flags, tables
from experiments.environment import environment
from experiments.models import llama, llama_files
from experiments.workdir import write as write_file

PyTree = Any
INT = jc.quantize.Int
RULES: dict[str, Any] = {
    "dense": [],
    "8 bits": [(".*/kernel|embed/embedding", INT(bits=8))],
    "4 bits": [("embed/embedding", INT(bits=8)), (".*/kernel", INT(bits=4, group_size=32))],
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: of the softmax; 0 for the likeliest token.
      top_k: tokens that may be chosen, the likeliest; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """A token for each row of logits (batch, vocab)."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if self.top_k is not None:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)


class Generator:
    """A decoder under ``jc.accelerate``, compiled once for a prompt's length and once for one token.

    Args:
      config: the model.
      length: tokens that fit into the cache.
      sampling: how tokens are chosen.
      stored: bits of keys and values, 8 or 4; None to keep them as they are.
      stop: a token that ends a text, or None.
      fast: runs a function on nodes: ``jc.accelerate``.
    """

    def __init__(
        self,
        config: llama.Config,
        length: int,
        sampling: Sampling = Sampling(),
        stored: int | None = None,
        stop: int | None = None,
        fast: Callable[[Callable[..., Any]], Callable[..., Any]] = jc.accelerate,
    ) -> None:
        self.config, self.length, self.sampling, self.stop = config, length, sampling, stop
        self.store = None if stored is None else cache_in(stored)
        self.step = fast(
            lambda params, tokens, cache: llama.apply(params, tokens, config, cache=cache, store=self.store)
        )
        self.prefill = jax.jit(self._next, donate_argnames="cache")
        self.decode = jax.jit(self._next, donate_argnames="cache")

    def empty(self, params: PyTree, batch: int) -> PyTree:
        """A cache without tokens."""
        stacked = isinstance(params["layers"], dict)
        return llama.init_cache(self.config, batch, self.length, stacked, store=self.store)

    def _next(self, params: PyTree, tokens: jax.Array, cache: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        """The token (batch, 1) after these, and the cache with them in it; the old cache's memory is used again."""
        logits, cache = self.step(params, tokens, cache)
        return self.sampling(logits[:, -1], key)[:, None], cache

    def decoded(
        self, decode: Callable[..., Any], params: PyTree, token: jax.Array, cache: PyTree, key: jax.Array, count: int
    ) -> list[jax.Array]:
        """Tokens one after the other, fewer where all texts have ended.

        Each step is a call of its own. Inside one loop XLA for CPUs would widen codes before it, once, and keep what
        it got, in the memory that codes are to save; and what is in a loop it runs on one core.
        """
        made = []
        for i in range(count):
            token, cache = decode(params, token, cache, jax.random.fold_in(key, i))
            made.append(token)
            if self.stop is not None and bool((jnp.concatenate(made, axis=1) == self.stop).any(1).all()):
                break
        return made

    def __call__(self, params: PyTree, tokens: jax.Array, count: int, key: jax.Array) -> jax.Array:
        """Tokens that follow a prompt.

        Args:
          params: nodes and arrays.
          tokens: int32 (batch, length).
          count: how many to make.
          key: of the random choices.

        Returns:
          int32 (batch, count), or fewer where all texts ended; what a text has behind its end means nothing.
        """
        if tokens.shape[1] + count > self.length:
            raise ValueError(f"{tokens.shape[1]} + {count} tokens do not fit into a cache of {self.length}")
        first, rest = jax.random.split(key)
        token, cache = self.prefill(params, tokens, self.empty(params, tokens.shape[0]), first)
        return jnp.concatenate([token, *self.decoded(self.decode, params, token, cache, rest, count - 1)], axis=1)


def cache_in(bits: int) -> Callable[[jax.Array], Any]:
    """Keys and values (batch, tokens, heads, channels) as codes, a scale for each head of each token.

    What a token leaves in the cache is what quantizing all of them at once would give: no scale is shared with another
    token. In 4 bits two codes share a byte.
    """
    # The last axis is what shares a scale: for a method it is what is summed over.
    method, layout = INT(bits=bits), jc.Layout(inputs=-1, outputs=-2, batch=(-4, -3))

    def store(x: jax.Array) -> Any:
        node = jc.compress({"x": x}, jc.plan({"x": x}, [("x", method)], layout={"x": layout}))["x"]
        return jc.pack(node) if bits < 8 else node

    return store


def planned(params: PyTree, config: llama.Config, rules: Sequence[tuple[str, Any]]) -> PyTree:
    """The parameters as nodes, in groups along what their products sum over."""
    if not rules:
        return params
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    layout = jc.trace.layout(lambda p, t: llama.apply(p, t, config), params, tokens)
    return jc.compress(params, jc.plan(params, [*rules, (".*", None)], layout=layout))


def sides(params: PyTree, config: llama.Config, names: Sequence[str]) -> dict[str, PyTree]:
    """What is compared: trees by name. Of dense parameters both forms, as ``scan`` copies the layers that it slices."""
    stacked = llama.stack(params)
    found = {}
    for name in names:
        kind, _, how = name.partition(", ")
        tree = planned(stacked if "stacked" in how else params, config, RULES[kind])
        found[name] = jc.pack(tree) if "packed" in how else tree
    return found


NAMES = ("dense", "8 bits", "4 bits", "4 bits, packed", "dense, stacked", "4 bits, stacked")


def nbytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def measured(
    trees: dict[str, PyTree], generator: Generator, prompt: jax.Array, count: int, turns: int, others: dict[str, Any]
) -> list[dict[str, Any]]:
    """Tokens a second of each tree, in turns, and the memory of its arrays and of the step.

    Args:
      trees: what is compared, the dense one first.
      generator: runs them.
      prompt: int32 (1, length).
      count: tokens of a turn.
      turns: how often each decodes.
      others: ``call() -> seconds`` a token for what is compared beside them.
    """
    key, runs, rows, first = jax.random.key(0), {}, [], {}
    for name, tree in trees.items():
        token, cache = generator.prefill(tree, prompt, generator.empty(tree, 1), key)
        compiled = generator.decode.lower(tree, token, cache, key).compile()
        memory = compiled.memory_analysis()
        rows.append({"name": name, "parameters": nbytes(tree), "temporary": int(memory.temp_size_in_bytes)})
        runs[name] = functools.partial(_turn, compiled, generator, tree, prompt, key, count)
        first[name] = runs[name]()[1]
        print(f"{name}: compiled", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in (*runs, *others)}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(run()[0] / count)
        for name, call in others.items():
            times[name].append(call())
    rows += [{"name": name} for name in others]
    dense = statistics.median(times["dense"])
    for row in rows:
        each = statistics.median(times[row["name"]])
        paired = statistics.median(d / t for d, t in zip(times["dense"], times[row["name"]], strict=True))
        row |= {"tokens_per_second": 1 / each, "beside_dense": paired, "seconds": times[row["name"]], "dense": dense}
        if row["name"] in first:
            row["tokens_as_dense"] = float((first[row["name"]] == first["dense"]).mean())
    return rows


def _turn(
    compiled: Any, generator: Generator, tree: PyTree, prompt: jax.Array, key: jax.Array, count: int
) -> tuple[float, jax.Array]:
    token, cache = jax.block_until_ready(generator.prefill(tree, prompt, generator.empty(tree, 1), key))
    start = time.perf_counter()
    tokens = jax.block_until_ready(generator.decoded(compiled, tree, token, cache, key, count))
    return time.perf_counter() - start, jnp.concatenate(tokens, axis=1)


def llama_cpp(file: str, prompt: Sequence[int], count: int, length: int) -> dict[str, Any]:
    """The same file decoded by llama.cpp on as many threads, where it is installed."""
    try:
        import llama_cpp as other
    except ImportError:
        return {}
    model = other.Llama(file, n_ctx=length, n_threads=jax.local_device_count() * 2, verbose=False)

    def call() -> float:
        model.reset()
        model.eval(list(prompt))
        start = time.perf_counter()
        for _ in range(count):
            model.eval([model.sample(temp=0.0)])
        return (time.perf_counter() - start) / count

    return {"llama.cpp": call}


def table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [("what", "parameters MB", "temporary MB", "tokens/s", "beside dense", "tokens as dense")]
    for row in rows:
        sizes = [f"{row[k] / 1e6:.1f}" if k in row else "" for k in ("parameters", "temporary")]
        same = f"{row['tokens_as_dense']:.0%}" if "tokens_as_dense" in row else ""
        cells.append((row["name"], *sizes, f"{row['tokens_per_second']:.1f}", f"{row['beside_dense']:.2f}", same))
    return tables.aligned(cells, range(len(cells[0])))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    found = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--file", help="a GGUF file, or a folder of the Hugging Face hub; random parameters without one")
    found.add_argument("--size", default="135m", choices=("135m", "tiny"), help="of random parameters")
    found.add_argument("--prompt", default="The first thing to know about compression is", help="with --file")
    found.add_argument("--tokens", type=flags.positive, default=32, help="that a turn decodes")
    found.add_argument("--turns", type=flags.positive, default=5, help="of each side")
    found.add_argument("--cache", type=int, choices=(4, 8), help="bits of keys and values")
    found.add_argument("--temperature", type=float, default=0.0, help="0 for the likeliest token")
    found.add_argument("--top_k", type=int, help="how many tokens may be chosen")
    found.add_argument("--only", nargs="+", default=list(NAMES), help="rows, 'dense' among them")
    found.add_argument("--out", default="runs/generate.json", help="the JSON file to write")
    args = found.parse_args(argv)
    config, params, tokenizer = _model(args)
    ids = tokenizer.encode(args.prompt).ids if tokenizer else list(range(1, 17))
    length = len(ids) + args.tokens + 1
    generator = Generator(config, length, Sampling(args.temperature, args.top_k), args.cache)
    trees = sides(params, config, ["dense", *(n for n in args.only if n != "dense")])
    if tokenizer:
        made = generator(trees[args.only[-1]], jnp.asarray([ids], jnp.int32), args.tokens, jax.random.key(0))
        print(args.prompt + tokenizer.decode(made[0].tolist()))
    others = llama_cpp(args.file, ids, args.tokens, length) if (args.file or "").endswith(".gguf") else {}
    rows = measured(trees, generator, jnp.asarray([ids], jnp.int32), args.tokens, args.turns, others)
    settings = {k: x for k, x in vars(args).items() if k != "out"} | {"file": args.file and Path(args.file).name}
    record = {"settings": settings, "environment": environment(), "rows": rows}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_file(Path(args.out), json.dumps(record, indent=1) + "\n")
    print(f"{table(rows)}\nwrote {args.out}")
    return rows


def _model(args: argparse.Namespace) -> tuple[llama.Config, PyTree, Any]:
    if args.file:
        return tuple(llama_files.load(args.file))  # type: ignore[return-value]
    config = llama.Config.tiny() if args.size == "tiny" else llama.Config.smollm2_135m()
    return config, llama.init(jax.random.key(0), config), None


if __name__ == "__main__":
    main()
