"""Functions of compressed parameters as programs that run without their Python: StableHLO and ONNX."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jcompress.core import PyTree
from jcompress.io import files
from jcompress.io.manifest import StorageError


def export_stablehlo(
    path: str | os.PathLike[str],
    fn: Callable[..., Any],
    tree: PyTree,
    *args: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> int:
    """Write ``fn(tree, *args)`` as StableHLO for several platforms; the tree stays an argument.

    No weight is in the file: whoever runs it loads the tree from its own, ``jc.io.load_stablehlo(path)(jc.load(...))``.

    Args:
      path: the file. An existing one is replaced.
      fn: takes the nodes themselves: ``jc.accelerate(fn)``, or one that calls ``jc.materialize``.
      tree: nodes and arrays, or their shapes.
      *args: arrays, or their shapes; of ``jax.export.symbolic_shape`` too.
      platforms: what it is lowered for.

    Returns:
      The number of bytes written.

    Raises:
      ImportError: without the package flatbuffers, which ``jcompress[export]`` brings.
      StorageError: for a full disk, as an ``OSError`` too, and nothing is written.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jcompress as jc  # doctest: +SKIP
      >>> small = {"w": jc.quantize.Int(bits=4)(jnp.ones((8, 2)))}  # doctest: +SKIP
      >>> fn = jc.accelerate(lambda params, x: x @ params["w"])  # doctest: +SKIP
      >>> size = jc.io.export_stablehlo("fn.bin", fn, small, jnp.ones((3, 8)))  # doctest: +SKIP
      >>> jc.io.load_stablehlo("fn.bin")(small, jnp.ones((3, 8))).shape  # doctest: +SKIP
      (3, 2)
    """
    exported = jax.export.export(jax.jit(fn), platforms=tuple(platforms))(tree, *args)
    data = _serialized(exported)
    return files.replace(path, lambda file: file.write(data))


def _serialized(exported: Any) -> bytes:
    try:
        return bytes(exported.serialize())
    except ImportError:
        raise ImportError('export_stablehlo needs flatbuffers; pip install "jcompress[export]"') from None


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function that :func:`export_stablehlo` wrote, to be called with a tree of the same structure and shapes.

    A program from a file runs as it is: load files that you trust.

    Args:
      path: the file.

    Returns:
      A function of the tree and the arguments, which runs on any of the platforms it was written for.

    Raises:
      StorageError: if there is no such file, or it holds no program.

    Example:
      >>> import jcompress as jc
      >>> fn = jc.io.load_stablehlo("fn.bin")  # doctest: +SKIP
    """
    with files.reading(path) as file:
        data = file.read()
    try:
        return jax.export.deserialize(bytearray(data)).call
    except ImportError:
        raise ImportError('load_stablehlo needs flatbuffers; pip install "jcompress[export]"') from None
    except Exception as error:
        told = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        raise StorageError(f"{path}: found no program of jax.export ({told}); check the path") from None


def export_onnx(path: str | os.PathLike[str], fn: Callable[..., Any], tree: PyTree, *args: Any) -> int:
    """Write ``fn(tree, *args)`` as an ONNX model, the arrays of the nodes as its initializers.

    Args:
      path: the file. An existing one is replaced.
      fn: takes the nodes themselves, such as one that calls ``jc.materialize``; made of operations that jax2onnx knows.
      tree: nodes and arrays, with values.
      *args: arrays, or their shapes.

    Returns:
      The number of bytes written.

    Raises:
      ImportError: without the package jax2onnx, which ``jcompress[onnx]`` brings.
      StorageError: for what jax2onnx cannot convert.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> small = {"w": jc.quantize.Int(bits=8)(jnp.ones((8, 2)))}
      >>> fn = lambda params, x: x @ jc.materialize(params)["w"]
      >>> size = jc.io.export_onnx("fn.onnx", fn, small, jnp.ones((3, 8)))  # doctest: +SKIP
    """
    try:
        import jax2onnx
    except ImportError:
        raise ImportError('export_onnx needs jax2onnx; pip install "jcompress[onnx]"') from None
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    try:
        model = jax2onnx.to_onnx(lambda *inputs: fn(tree, *inputs), inputs=shapes)
    except Exception as error:
        told = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        raise StorageError(f"{path}: jax2onnx cannot convert the function ({told})") from error
    data = model.SerializeToString()
    return files.replace(path, lambda file: file.write(data))
