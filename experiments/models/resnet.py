"""ResNets for CIFAR-10 as plain functions of arrays, trained elsewhere or here (He et al. 2016).

Names and layouts are those of a PyTorch state dict: kernels OIHW, a batch norm as ``weight``, ``bias``,
``running_mean`` and ``running_var``. Shortcuts are of option A: every other pixel, and zeros for channels that are new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.data import DataError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Params = dict[str, Any]


def load(path: str | Path) -> tuple[Params, Params]:
    """Parameters ``{"layer1/0/conv1/weight": ...}`` and batch statistics, from an ``.npz`` of a state dict.

    Raises:
      DataError: if the file is not there, or is none.
    """
    try:
        with np.load(path) as found:
            arrays = {name.replace(".", "/"): jnp.asarray(found[name]) for name in found.files}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected the .npz of a ResNet for CIFAR-10") from None
    statistics = {name: x for name, x in arrays.items() if "/running_" in name}
    return {name: x for name, x in arrays.items() if name not in statistics}, statistics


def init(key: jax.Array, depth: int = 20, width: int = 16, classes: int = 10) -> tuple[Params, Params]:
    """Fresh parameters (He et al. 2015), and batch statistics of means 0 and variances 1.

    Args:
      key: of the random numbers.
      depth: 6 n + 2: a stem, three stages of n blocks with two convolutions each, and the head.
      width: channels of the first stage; each later one has twice as many.
      classes: outputs.

    Raises:
      ValueError: if there is no network of this depth.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth={depth} is not 6 n + 2; use {max(depth - 2, 6) // 6 * 6 + 2}")
    shapes, last = {"conv1": (width, 3), "bn1": (width, width)}, width
    for stage, i in [(stage, i) for stage in (1, 2, 3) for i in range((depth - 2) // 6)]:
        now = width * 2 ** (stage - 1)
        for part, inputs in ((1, last), (2, now)):
            shapes[f"layer{stage}/{i}/conv{part}"] = (now, inputs)
            shapes[f"layer{stage}/{i}/bn{part}"] = (now, now)
        last = now
    params: Params = {}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    for name, (outputs, inputs) in shapes.items():
        if "conv" in name:
            kernel = jax.random.normal(keys[name], (outputs, inputs, 3, 3))
            params[f"{name}/weight"] = kernel * (2 / (9 * inputs)) ** 0.5
        else:
            params |= {f"{name}/weight": jnp.ones(outputs), f"{name}/bias": jnp.zeros(outputs)}
    head = jax.random.normal(jax.random.fold_in(key, 1), (classes, last)) / last**0.5
    params |= {"linear/weight": head, "linear/bias": jnp.zeros(classes)}
    norms = {name: outputs for name, (outputs, _) in shapes.items() if "bn" in name}
    means = {f"{name}/running_mean": jnp.zeros(n) for name, n in norms.items()}
    return params, means | {f"{name}/running_var": jnp.ones(n) for name, n in norms.items()}


def apply(
    params: Params, x: jax.Array, statistics: Mapping[str, Any] | None = None, dtype: Any = jnp.float32
) -> tuple[jax.Array, Params]:
    """Logits (n, 10), and the batch statistics that were used.

    Args:
      params: from :func:`load` or :func:`init`.
      x: images (n, 32, 32, 3) in [0, 1].
      statistics: from :func:`load`; without them those of this batch are taken.
      dtype: of convolutions; norms and logits are float32.
    """
    return segment(params, x, statistics, dtype=dtype)


def segment(
    params: Params,
    x: jax.Array,
    statistics: Mapping[str, Any] | None = None,
    begin: int = 0,
    end: int | None = None,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, Params]:
    """A part of :func:`apply`: blocks ``begin`` to ``end``, with the stem before block 0 and the head after the last.

    Between parts stand features (n, channels, height, width).
    """
    used: Params = {}

    def convolved(x: jax.Array, name: str, stride: int) -> jax.Array:
        kernel = params[f"{name}/weight"].astype(dtype)
        found = jax.lax.conv_general_dilated(x.astype(dtype), kernel, (stride, stride), [(1, 1), (1, 1)])
        return found.astype(jnp.float32)

    def normed(x: jax.Array, name: str) -> jax.Array:
        mean, var = f"{name}/running_mean", f"{name}/running_var"
        if statistics is None:
            used[mean], used[var] = x.mean((0, 2, 3)), x.var((0, 2, 3))
        else:
            used[mean], used[var] = statistics[mean], statistics[var]
        scale = params[f"{name}/weight"] * jax.lax.rsqrt(used[var] + 1e-5)
        shift = params[f"{name}/bias"] - used[mean] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    if begin == 0:
        x = ((x - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)).transpose(0, 3, 1, 2)
        x = jax.nn.relu(normed(convolved(x, "conv1", 1), "bn1"))
    for block, stride in list(_blocks(params))[begin:end]:
        y = jax.nn.relu(normed(convolved(x, f"{block}/conv1", stride), f"{block}/bn1"))
        y = normed(convolved(y, f"{block}/conv2", 1), f"{block}/bn2")
        if stride == 2:
            more = y.shape[1] - x.shape[1]
            x = jnp.pad(x[:, :, ::2, ::2], ((0, 0), (more // 2, more - more // 2), (0, 0), (0, 0)))
        x = jax.nn.relu(x + y)
    if end is None:
        x = x.mean((2, 3)) @ params["linear/weight"].T + params["linear/bias"]
    return x, used


def logits(params: Params, x: jax.Array, statistics: Mapping[str, Any]) -> jax.Array:
    """Logits (n, 10) with given batch statistics."""
    return apply(params, x, statistics)[0]


def with_statistics(params: Params, x: jax.Array) -> jax.Array:
    """Logits of parameters among which are the batch statistics; these get no gradient."""
    return logits(params, x, jax.lax.stop_gradient(params))


def in_training(params: Params, x: jax.Array) -> jax.Array:
    """Logits (n, 10) with the statistics of the batch itself."""
    return apply(params, x)[0]


def measured(training: Callable[[Params, Any], Any], params: Params, x: jax.Array) -> Params:
    """The batch statistics of :func:`in_training`, or of what was cut from it: of what each convolution gives."""
    _, found = jc.trace.features(training, params, x, match=r".*conv\d/weight")
    norms = {path: path.replace("conv", "bn").removesuffix("weight") for path in found}
    means = {f"{norm}running_mean": found[path].mean((0, 2, 3)) for path, norm in norms.items()}
    return means | {f"{norm}running_var": found[path].var((0, 2, 3)) for path, norm in norms.items()}


def _blocks(params: Params) -> Iterator[tuple[str, int]]:
    for stage in (1, 2, 3):
        depth = len({name.split("/")[1] for name in params if name.startswith(f"layer{stage}/")})
        for i in range(depth):
            yield f"layer{stage}/{i}", 2 if stage > 1 and i == 0 else 1


def augmented(x: np.ndarray, seed: int) -> np.ndarray:
    """Images as they were in training: in a black frame of four pixels, cropped at random, flipped half of the time.

    A frame that is zero after normalization is grey: batch statistics of such images are not those of training.
    """
    rng, n = np.random.default_rng(seed), x.shape[1]
    wide = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rows, columns = rng.integers(0, 9, len(x)), rng.integers(0, 9, len(x))
    found = np.stack([image[a : a + n, b : b + n] for image, a, b in zip(wide, rows, columns, strict=True)])
    flip = rng.random(len(x)) < 0.5
    found[flip] = found[flip, :, ::-1]
    return found


def restated(params: Params, images: np.ndarray, batch_size: int = 250, seed: int = 0) -> Params:
    """Batch statistics estimated anew on augmented images: the means over batches."""
    batches = [augmented(images[i : i + batch_size], seed + i) for i in range(0, len(images), batch_size)]
    of = jax.jit(lambda params, x: apply(params, x)[1])
    found = [of(params, batch) for batch in batches]
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *found)
