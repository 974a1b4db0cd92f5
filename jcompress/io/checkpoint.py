"""Checkpoints of a training state by Orbax, with what Orbax does not keep or check written beside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import PyTree
from jcompress.io import decoding, encoding, manifest, plans
from jcompress.io.encoding import inner_leaves, unique_paths
from jcompress.io.manifest import StorageError, join
from jcompress.io.restore import check_paths, kind
from jcompress.io.streams import Store
from jcompress.version import __version__

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

FORMAT_VERSION = 1


class Checkpoints:
    """A folder of checkpoints of a training state: a thin wrapper of ``orbax.checkpoint.CheckpointManager``.

    The state is any pytree: parameters, nodes, optimizer states with :class:`jcompress.ProjectState`, PRNG keys,
    Python scalars. Dtypes that Orbax refuses are stored as bytes. A manifest beside the arrays holds their paths,
    dtypes and shapes, the static fields of nodes, and the plan; ``restore`` compares all of it first, since Orbax
    casts to the dtype of its template without a word.

    Saving goes on in the background. An interrupted save leaves the steps before it.

    Args:
      directory: the folder; made if it does not exist.
      plan: the plan of the run. One that differs from the plan that was saved is refused; schedules are compared by
        their values at a few steps.
      max_to_keep: how many of the latest steps to keep, or None for all.
      options: an ``orbax.checkpoint.CheckpointManagerOptions`` instead of ``max_to_keep``, for all that Orbax offers.

    Raises:
      StorageError: if the directory is a file.

    Example:
      >>> import tempfile, jax.numpy as jnp, jcompress as jc
      >>> state = {"params": {"w": jnp.arange(3.0)}, "step": 7}
      >>> with tempfile.TemporaryDirectory() as folder, jc.io.Checkpoints(folder) as checkpoints:
      ...     saved = checkpoints.save(7, state)
      ...     again = checkpoints.restore({"params": {"w": jnp.zeros(3)}, "step": 0})
      >>> again["params"]["w"].tolist(), again["step"]
      ([0.0, 1.0, 2.0], 7)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: Mapping[str, Any] | None = None,
        *,
        max_to_keep: int | None = 3,
        options: ocp.CheckpointManagerOptions | None = None,
    ) -> None:
        # Orbax takes seconds to import, and most users of this package never write a checkpoint.
        import orbax.checkpoint as ocp

        self._args = ocp.args
        self._plan = None if plan is None else plans.texts(plan)
        self._values = None if plan is None else plans.values(plan)
        directory = os.fspath(directory)
        if os.path.exists(directory) and not os.path.isdir(directory):
            raise StorageError(f"{directory}: found a file, expected a directory; add a name to the path")
        options = options or ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
        self._manager = ocp.CheckpointManager(
            directory if "://" in directory else os.path.abspath(directory), options=options
        )

    def save(self, step: int, state: PyTree, *, force: bool = False) -> bool:
        """Start to save ``state``; it may be donated or changed as soon as this returns.

        Args:
          step: the number of the step.
          state: a pytree.
          force: save even where the options would skip this step.

        Returns:
          Whether the options want this step.

        Raises:
          StorageError: for a leaf that cannot be stored; the message names its path. Nothing is written then.
        """
        leaves = _leaves(state)
        about = {**_describe(state, leaves), "plan": self._plan, "schedules": self._values}
        arrays = {name: _to_wire(x) for name, x in leaves.items() if _is_stored(x)}
        args = self._args.Composite(
            state=self._args.StandardSave(arrays or {"": np.zeros(1)}), manifest=self._args.JsonSave(about)
        )
        return bool(self._manager.save(step, args=args, force=force))

    def restore(self, state_like: PyTree, step: int | None = None) -> PyTree:
        """The state of a step, in the structure and on the devices of ``state_like``.

        Args:
          state_like: a fresh state, or its shapes as ``jax.eval_shape`` gives them. Arrays go where its arrays or
            their ``sharding`` are; the number of devices may differ from that at the time of saving.
          step: the step, by default the latest.

        Raises:
          StorageError: if there is no such step, or a path, dtype, shape, static field of a node, or the plan
            differs from what was saved. The message names the path. Nothing is ever cast.
        """
        self.wait()
        step = self._step(step)
        about = self._about(step)
        leaves = _leaves(state_like)
        _compare(about, _describe(state_like, leaves), self._plan, self._values)
        templates = {name: _template(x, about["keys"].get(name)) for name, x in leaves.items() if _is_stored(x)}
        args = self._args.Composite(state=self._args.StandardRestore(templates or {"": np.zeros(1)}))
        try:
            arrays = self._manager.restore(step, args=args)["state"]
        except Exception as error:  # of Orbax, of the store beneath it, or of the system
            raise StorageError(f"{self._manager.directory}: step {step} is damaged; choose another step") from error
        values = [_restored(name, x, arrays, about) for name, x in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(state_like), values)

    def _about(self, step: int) -> dict[str, Any]:
        damaged = (
            f"{self._manager.directory}: step {step} has no manifest of jcompress, or a damaged one; "
            "restore it with what wrote it, or choose another step"
        )
        try:
            args = self._args.Composite(manifest=self._args.JsonRestore())
            about = self._manager.restore(step, args=args)["manifest"]
        except (KeyError, ValueError, OSError) as error:
            raise StorageError(damaged) from error
        if not isinstance(about, dict) or not isinstance(about.get("version"), int):
            raise StorageError(damaged)
        if about["version"] != FORMAT_VERSION:
            raise StorageError(
                f"found checkpoint version {about['version']}, expected {FORMAT_VERSION}; "
                "install the jcompress that wrote it"
            )
        if not all(isinstance(about.get(name), dict) for name in ("leaves", "keys", "scalars", "nodes")):
            raise StorageError(damaged)
        return about

    def _step(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise StorageError(f"{self._manager.directory}: found the steps {steps}, expected {wanted}; save one first")
        return steps[-1] if step is None else step

    def latest_step(self) -> int | None:
        """The latest step that was saved whole, or None."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The steps that are kept, in order."""
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """Whether this is the step at which all processes are to save and stop, as one of them is to be preempted.

        Always False where ``jax.distributed`` was not initialized.

        Args:
          step: the number of the step. All processes ask after every step.
        """
        return bool(self._manager.reached_preemption(step))

    def wait(self) -> None:
        """Wait until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and give the manager's threads back."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _leaves(tree: PyTree) -> dict[str, Any]:
    """All leaves with their paths, the arrays inside nodes too, in the order of ``jax.tree.leaves``."""
    leaves: dict[str, Any] = {}
    for path, x in unique_paths(tree):
        inner = [(join(path, name), y) for name, y in inner_leaves(x)] if core.is_node(x) else [(path or "state", x)]
        for name, y in inner:
            if name in leaves:
                raise StorageError(f"{name}: found two leaves of this path; rename one")
            leaves[name] = y
    return leaves


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _is_stored(x: Any) -> bool:
    """Whether Orbax gets the leaf: scalars stand in the manifest, and of an array without entries nothing is left."""
    return _is_array(x) and x.size > 0


def _describe(tree: PyTree, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What Orbax does not keep, or does not compare."""
    for name, x in leaves.items():
        if not (_is_array(x) or isinstance(x, (bool, int, float, complex, str))):
            raise StorageError(f"{name}: found {type(x).__name__}, expected an array or a Python scalar; leave it out")
        if _is_array(x):
            encoding.check_array(x, name)
    keys = {name: x for name, x in leaves.items() if isinstance(x, jax.Array) and manifest.is_key(x)}
    return {
        "version": FORMAT_VERSION,
        "jcompress": __version__,
        "jax": jax.__version__,
        "leaves": {name: kind(x) for name, x in leaves.items()},
        "keys": {name: str(jax.random.key_impl(x)) for name, x in keys.items()},
        "scalars": {name: encoding.encode(x, name, Store()) for name, x in leaves.items() if not _is_array(x)},
        "nodes": {path: encoding.node_spec(x, path, {}) for path, x in unique_paths(tree) if core.is_node(x)},
    }


def _compare(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    plan: Mapping[str, str] | None,
    values: Mapping[str, plans.Values] | None,
) -> None:
    check_paths(found["leaves"], wanted["leaves"])
    differences = [("leaves", found["leaves"], wanted["leaves"]), ("nodes", found["nodes"], wanted["nodes"])]
    if plan is not None and found.get("plan") is not None:
        differences.append(("plan", found["plan"], plan))
    for what, old, new in differences:
        for path in [*old, *new]:
            if old.get(path) != new.get(path):
                of = " in the plan" if what == "plan" else ""
                raise StorageError(
                    f"{path}: found {old.get(path)}{of}, expected {new.get(path)}; nothing is cast: "
                    "build the state as it was when it was saved"
                )
    if values is not None and found.get("schedules") is not None:
        plans.compare(found["schedules"], values)


def _sharding(x: Any) -> jax.sharding.Sharding | None:
    """Where the leaf must lie, or None if any device will do; those pass through the host."""
    if isinstance(x, jax.Array):
        return x.sharding if x.committed or not x.is_fully_addressable else None
    return getattr(x, "sharding", None)


def _wire_dtype(dtype: Any) -> np.dtype:
    """The dtype in which Orbax gets an array: whole bytes of a type that every version of it knows."""
    dtype = np.dtype(dtype).newbyteorder("=")
    narrow = core.dtype_bits(dtype) <= 8 and dtype != jnp.bool_ and np.dtype(dtype).kind not in "iu"
    return np.dtype(np.uint8) if narrow else np.dtype(dtype)


def _to_wire(x: Any) -> Any:
    if isinstance(x, jax.Array) and manifest.is_key(x):
        x = jax.random.key_data(x)
    if _sharding(x) is None:
        x = np.asarray(x)
        x = x.astype(x.dtype.newbyteorder("="), copy=False)
        return x if _wire_dtype(x.dtype) == x.dtype else x.view(np.uint8)
    return x if _wire_dtype(x.dtype) == x.dtype else _to_bytes(x)


@jax.jit
def _to_bytes(x: jax.Array) -> jax.Array:
    bits = core.dtype_bits(x.dtype)
    return jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint8)


def _from_wire(x: Any, dtype: Any) -> Any:
    if x.dtype == dtype:
        return x
    if isinstance(x, np.ndarray):
        return x.view(dtype)
    return jax.jit(lambda y: jax.lax.bitcast_convert_type(y.astype(f"uint{core.dtype_bits(dtype)}"), dtype))(x)


def _template(x: Any, impl: str | None) -> Any:
    shape, dtype, sharding = x.shape, x.dtype, _sharding(x)
    if impl is not None:
        shape, dtype = (*shape, *manifest.key_shape(impl)), np.dtype(np.uint32)
        if isinstance(x, jax.Array) and sharding is not None:
            sharding = jax.random.key_data(x).sharding
    if sharding is None:
        return np.broadcast_to(np.zeros((), _wire_dtype(dtype)), shape)
    return jax.ShapeDtypeStruct(shape, _wire_dtype(dtype), sharding=sharding)


def _restored(name: str, like: Any, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> Any:
    if name in about["scalars"]:
        return decoding.decode(about["scalars"][name], lambda spec: spec)
    impl = about["keys"].get(name)
    if name not in arrays:
        return like if isinstance(like, (jax.Array, np.ndarray)) else jnp.zeros(like.shape, like.dtype)
    x = arrays[name]
    if impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    dtype = np.dtype(like.dtype).newbyteorder("=")
    x = _from_wire(x, dtype)
    if x.dtype != dtype:
        raise StorageError(f"{name}: found {kind(x)} in the checkpoint, expected {kind(like)}; it is damaged")
    if isinstance(like, np.generic):
        return np.asarray(x)[()]
    return x if isinstance(like, np.ndarray) or isinstance(x, jax.Array) else jnp.asarray(x)
