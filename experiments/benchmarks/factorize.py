"""Factorizations against scikit-learn and tensorly, and functions run on factors against the dense ones.

    python -m experiments.benchmarks.factorize

One thread, and seconds of the process, so that a loaded machine does not count. Decompositions take the same float32
array and the same ranks on both sides, compiled before they are timed; ``error`` is relative to what the other side
leaves (for the singular value decomposition, to the optimum). Products are taken at the share of the dense
multiply-adds that a row names; ``how`` is what the report says of the first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.integer import transformer

F = jc.factorize
Case = functools.partial(timing.Case, clock=time.process_time, calls=(4, 4))
Decomposed = functools.partial(timing.Case, clock=time.process_time, calls=(8, 2), part=0.5)


def decaying(rng: np.random.Generator, rows: int, columns: int, power: float = 0.5) -> np.ndarray:
    """A matrix whose singular values fall like a power, as those of trained layers do."""
    n = min(rows, columns)
    u, v = (np.linalg.qr(rng.normal(size=(m, n)))[0] for m in (rows, columns))
    return ((u * np.arange(1, n + 1) ** -power) @ v.T).astype(np.float32)


def kernel(rng: np.random.Generator, window: tuple[int, ...], inputs: int, outputs: int) -> np.ndarray:
    """A convolution kernel in whose unfoldings singular values fall."""
    w = decaying(rng, int(np.prod(window)) * inputs, outputs)
    return w.reshape(*window, inputs, outputs)


def svd(size: int, rank: int) -> tuple:
    from sklearn.utils.extmath import randomized_svd

    w = decaying(np.random.default_rng(0), 2 * size, size)
    x, method = jnp.asarray(w), F.SVD(rank=rank, randomized=True)
    ours = jax.jit(lambda w, key: method(w, jc.Context(key=key)))
    key = jax.random.key(0)
    left = functools.partial(ours, x, key)
    right = functools.partial(randomized_svd, w, rank, random_state=0)
    best = np.sqrt((np.linalg.svd(w.astype(np.float64), compute_uv=False)[rank:] ** 2).sum())
    u, s, v = right()
    extra = {
        "error": float(np.linalg.norm(w - np.asarray(left().materialize())) / best),
        "other": float(np.linalg.norm(w - (u * s) @ v) / best),
    }
    return left, right, extra


def compared(w: np.ndarray, method: Any, peer: Callable[[], Any], dense: Callable[[Any], np.ndarray]) -> tuple:
    """A method beside a function of tensorly, with the ratio of their errors."""
    x, ours = jnp.asarray(w), jax.jit(lambda w: method(w))
    error = np.linalg.norm(np.asarray(ours(x).materialize()) - w), np.linalg.norm(dense(peer()).reshape(w.shape) - w)
    return functools.partial(ours, x), peer, {"error": float(error[0] / error[1])}


def train(channels: int, rank: int) -> tuple:
    import tensorly
    from tensorly.decomposition import tensor_train

    w = kernel(np.random.default_rng(0), (3, 3), channels, channels)
    node = jax.eval_shape(F.TensorTrain(rank=rank), w)
    ranks = [1, *(f.shape[-1] for f in node.factors[:-1]), 1]
    return compared(w, F.TensorTrain(rank=rank), lambda: tensor_train(w, ranks), tensorly.tt_to_tensor)


def train_matrix(modes: tuple[int, ...], rank: int) -> tuple:
    from tensorly.decomposition import tensor_train_matrix
    from tensorly.tt_matrix import tt_matrix_to_tensor

    n = int(np.prod(modes))
    w = decaying(np.random.default_rng(0), n, n)
    method = F.TensorTrain(rank=rank, shape=(modes, modes))
    node = jax.eval_shape(method, w)
    ranks = [1, *(f.shape[-1] for f in node.factors[:-1]), 1]
    tensor = w.reshape(*modes, *modes)
    return compared(w, method, lambda: tensor_train_matrix(tensor, ranks), tt_matrix_to_tensor)


def tucker(channels: int, rank: int, sweeps: int) -> tuple:
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    w = kernel(np.random.default_rng(0), (3, 3), channels, channels)

    def peer() -> Any:
        return partial_tucker(w, rank=[rank, rank], modes=[2, 3], n_iter_max=sweeps, tol=0)[0]

    method = F.Tucker(ranks=(rank, rank), sweeps=sweeps)
    return compared(w, method, peer, lambda found: multi_mode_dot(found[0], found[1], modes=[2, 3]))


def cp(shapes: Sequence[tuple[int, ...]], rank: int, sweeps: int) -> tuple:
    """Sweeps over all tensors, ours in one plan; both start from the same number of terms."""
    from tensorly import cp_to_tensor
    from tensorly.decomposition import parafac

    rng = np.random.default_rng(0)
    arrays = {f"w{i}": kernel(rng, shape[:-2], *shape[-2:]) for i, shape in enumerate(shapes)}
    params = {path: jnp.asarray(w) for path, w in arrays.items()}
    plan = jc.plan(params, [(".*", F.CP(rank=rank, sweeps=sweeps, tolerance=0.0))])
    ours = jax.jit(lambda params: jc.compress(params, plan))

    def peer() -> list:
        flat = [w.reshape(-1, *w.shape[-2:]) for w in arrays.values()]
        with warnings.catch_warnings():  # of more terms than a mode has places
            warnings.simplefilter("ignore")
            return [parafac(w, rank, n_iter_max=sweeps, tol=0, init="svd", random_state=0) for w in flat]

    tree = ours(params)
    mine = sum(float(jnp.sum((tree[p].materialize() - params[p]) ** 2)) for p in params)
    pairs = zip(peer(), arrays.values(), strict=True)
    other = sum(float(np.sum((cp_to_tensor(found).reshape(w.shape) - w) ** 2)) for found, w in pairs)
    return functools.partial(ours, params), peer, {"error": (mine / other) ** 0.5}


def executed(fn: Callable, params: Any, rules: Sequence[tuple[str, Any]], *args: Any, inside: bool = False) -> tuple:
    """A function on factors beside the same on dense arrays, or, ``inside``, on nodes that it makes dense itself."""
    tree = jc.compress(params, jc.plan(params, rules))
    fast = jc.accelerate(fn)
    ours, plain = jax.jit(fast), jax.jit(fn)
    want = plain(jc.materialize(tree), *args)
    error = float(jnp.linalg.norm(ours(tree, *args) - want) / jnp.linalg.norm(want))
    rows = fast.report(tree, *args).rows
    extra = {"difference": error, "how": rows[0].how, "products": len(rows)}
    made = jax.jit(lambda tree, *args: fn(jc.materialize(tree), *args))
    other = functools.partial(made, tree, *args) if inside else functools.partial(plain, params, *args)
    return functools.partial(ours, tree, *args), other, extra


def convolution(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)


def one_convolution(method: Any, channels: int, places: int, batch: int) -> tuple:
    rng = np.random.default_rng(0)
    w = jnp.asarray(kernel(rng, (3, 3), channels, channels))
    x = jnp.asarray(rng.normal(size=(batch, places, places, channels)), jnp.float32)
    return executed(lambda p, x: convolution(x, p["w"]), {"w": w}, [("w", method)], x)


def one_product(method: Any, width: int, rows: int, inside: bool = False) -> tuple:
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(decaying(rng, width, width)), jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    return executed(lambda p, x: x @ p["w"], {"w": w}, [("w", method)], x, inside=inside)


def groups(width: int, size: int = 64) -> tuple:
    """Codes in groups beside the same made dense inside, with the temporary memory of either."""
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(decaying(rng, width, width)), jnp.asarray(rng.normal(size=(1, width)), jnp.float32)
    node = jc.quantize.Int(bits=4, group_size=min(size, width))(w)
    fast = jc.accelerate(lambda w, x: x @ w)
    sides = [jax.jit(fn).lower(node, x).compile() for fn in (fast, lambda node, x: x @ node.materialize())]
    mine, other = (int(side.memory_analysis().temp_size_in_bytes) for side in sides)
    extra = {"bytes": mine, "other": other, "memory": mine / other, "how": fast.report(node, x).rows[0].how}
    return *(functools.partial(side, node, x) for side in sides), extra


def kept_only(width: int, rows: int) -> tuple:
    """Only what a 2:4 mask keeps, inputs gathered for each output, beside what ``accelerate`` does of the mask."""
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(decaying(rng, width, width)), jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    node = jc.prune.Magnitude(pattern=jc.prune.NM(2, 4))(w)
    places = jnp.argsort(~np.asarray(node.mask), axis=0, stable=True)[: width // 2]
    values = jnp.take_along_axis(node.materialize(), places, axis=0)
    fast = jc.accelerate(lambda w, x: x @ w)
    gathered, ours = jax.jit(lambda v, i, x: jnp.einsum("rko,ko->ro", x[:, i], v)), jax.jit(fast)
    difference = float(jnp.abs(gathered(values, places, x) - ours(node, x)).max())
    extra = {"difference": difference, "how": fast.report(node, x).rows[0].how}
    return functools.partial(gathered, values, places, x), functools.partial(ours, node, x), extra


def whole_transformer(method: Any, width: int, depth: int) -> tuple:
    _, fn, params, args = transformer(width, depth, 8, 8, 128)
    return executed(fn, params, [(".*/kernel|head", method), (".*", None)], *args)


def whole_cnn(method: Any, width: int, batch: int) -> tuple:
    """A stem and three stages of two convolutions, each of half the places and twice the channels."""
    rng = np.random.default_rng(0)
    params = {"stem": jnp.asarray(kernel(rng, (3, 3), 3, width)), "head": jnp.asarray(decaying(rng, 4 * width, 10))}
    widths = [width, width, 2 * width, 4 * width]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        params |= {f"stage{i}/first": jnp.asarray(kernel(rng, (3, 3), a, b))}
        params |= {f"stage{i}/second": jnp.asarray(kernel(rng, (3, 3), b, b))}

    def fn(p: dict, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(convolution(x, p["stem"]))
        for i in range(3):
            x = jax.nn.relu(convolution(x, p[f"stage{i}/first"], 1 if i == 0 else 2))
            x = x + jax.nn.relu(convolution(x, p[f"stage{i}/second"]))
        return x.mean((1, 2)) @ p["head"]

    x = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
    return executed(fn, params, [("stage.*", method), (".*", None)], x)


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    n, c = args.size, args.channels
    label = f"randomized SVD, {2 * n} x {n}, rank {args.rank}"
    yield Decomposed(label, "SVD", "scikit-learn", lambda: svd(n, args.rank), ">= 1.2")
    yield Decomposed(f"train, 3 x 3 x {c} x {c}", "TensorTrain", "tensorly", lambda: train(c, c // 4), ">= 8")
    modes = args.modes
    label = f"train matrix, modes {tuple(modes)}"
    yield Decomposed(label, "TensorTrain", "tensorly", lambda: train_matrix(tuple(modes), args.rank), ">= 8")
    yield Decomposed(f"Tucker-2, 3 x 3 x {c} x {c}", "Tucker", "tensorly", lambda: tucker(c, c // 3, 3), ">= 8")
    stages = [(3, 3, 3, 16)] + [(3, 3, w, w) for w in (16, 32, 64) for _ in range(18)]
    small = stages if n > 256 else stages[:3]
    label = f"CP, {len(small)} small kernels"
    yield Decomposed(label, "CP", "tensorly", lambda: cp(small, 16, args.sweeps), ">= 2.5")
    label = f"CP, {n} x {n} x 9"
    yield Decomposed(label, "CP", "tensorly", lambda: cp([(3, 3, n, n)], args.rank, args.sweeps), ">= 7")
    conv = functools.partial(one_convolution, channels=c, places=16, batch=8)
    for width, places in ((c, 16), (2 * c, 8)):
        label, method = f"CP's chain at 50%, {width} channels", F.CP(rank=0.5, sweeps=3)
        make = functools.partial(one_convolution, method, width, places, 8)
        yield Case(label, "factors", "dense", make, ">= 1.8")
    yield Case("Tucker-2's chain at 30%", "factors", "dense", lambda: conv(F.Tucker(ranks=0.3)), ">= 1.9")
    product = functools.partial(one_product, width=2 * n, rows=256)
    yield Case("two factors at 25%", "factors", "dense", lambda: product(F.SVD(rank=0.25)), ">= 2.2")
    label = "a train matrix, dense where that is faster"
    method = F.TensorTrain(rank=args.rank, shape=(tuple(modes), tuple(modes)))
    width = int(np.prod(modes))
    yield Case(label, "accelerate", "made dense", lambda: one_product(method, width, 256, inside=True), ">= 0.95")
    label = f"4-bit groups at batch 1, {2 * n} x {2 * n}"
    yield Case(label, "accelerate", "made dense", lambda: groups(2 * n), ">= 1")
    for rows in (1, 16):
        label = f"2:4, only what is kept, {2 * n} x {2 * n}, {rows} rows"
        yield Case(label, "gathered", "accelerate", functools.partial(kept_only, 2 * n, rows))
    label = "transformer, matrices at 25%"
    yield Case(label, "factors", "dense", lambda: whole_transformer(F.SVD(rank=0.25), n, 2), ">= 1.8")
    label = "CNN, Tucker-2 at 30%"
    yield Case(label, "factors", "dense", lambda: whole_cnn(F.Tucker(ranks=0.3), c // 2, 8), ">= 1.7")


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "size": (512, "of matrices, and width of the transformer"),
        "channels": (128, "of convolutions"),
        "rank": (32, "of decompositions"),
        "modes": ([8, 8, 8], "of inputs and outputs of a train matrix"),
        "sweeps": (20, "of CP"),
    }
    timing.run("factorize", __doc__, cases, options, argv, pairs=15)


if __name__ == "__main__":
    timing.one_thread("experiments.benchmarks.factorize", sys.argv[1:])
    main()
