"""Trees made whole: references replaced by what they stand for, and nodes by their arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jcompress.core.compressed import PyTree, dense, finalized, is_node, opened
from jcompress.core.naming import closest, paths
from jcompress.core.references import Common, Reference, _prefixes, mapped, references, settled


def untie(tree: PyTree, *, whole: bool = True) -> PyTree:
    """Replace every reference by what it stands for, so that parts of the tree can be used, or trained, by themselves.

    All verbs see through references; this is for code that takes a tree apart, such as ``jax.lax.scan`` over the
    parameters of its layers. Gradients through the result add up in the owner.

    Args:
      tree: any pytree.
      whole: whether leaves that stand for other leaves are replaced too, or references to parts of nodes alone.

    Returns:
      The tree, without references, and without packed nodes. One that turns the axes of a node holds the node.

    Raises:
      ValueError: if a reference leads to nothing, to something of another shape, or back to itself. The message names
        both ends and the fix.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> tied = jc.tie({"embed": jnp.ones((5, 2)), "head": jnp.ones((5, 2))}, {"head": "embed"})
      >>> tied["head"], jc.untie(tied)["head"].shape
      (Reference(owner='embed', sizes=(5, 2)), (5, 2))
    """
    tree = opened(tree)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_node)
    if not any(map(references, leaves)):
        return tree
    known = dict(zip([path for path, _ in paths(tree)], leaves, strict=True))
    resolve = _Resolution(known)
    kept = [not whole and isinstance(x, Reference) and x.owner in known for x in leaves]
    found = [x if keep else resolve.inside(path, x) for (path, x), keep in zip(known.items(), kept, strict=True)]
    return jax.tree.unflatten(treedef, found)


class _Resolution:
    """What the references of a tree stand for.

    Args:
      leaves: of the tree, by path.
    """

    def __init__(self, leaves: dict[str, Any]) -> None:
        self._leaves = leaves

    def inside(self, path: str, node: Any, behind: tuple[str, ...] = ()) -> Any:
        """The node with all of its references resolved; ``behind`` are the references that led here."""
        return mapped(node, lambda x, own: self._value(x, own, behind), path) if is_node(node) else node

    def common(self, path: str, node: Any, shared: dict[str, tuple[int, ...]]) -> Any:
        """The node with the parts that leaves share, at these paths and what refers to them, as parts in common."""

        def one(x: Any, own: str) -> Any:
            owner = x.owner if isinstance(x, Reference) else own
            return Common(self._value(x, own, ()), (owner,), shared[owner]) if owner in shared else x

        return mapped(node, one, path, frozenset(shared))

    def _value(self, reference: Any, path: str, behind: tuple[str, ...]) -> Any:
        if not isinstance(reference, Reference) or reference.value is not None:
            return reference
        owner = reference.owner
        if owner in (path, *behind) or path in behind:
            raise ValueError(f"{path}: refers to {owner}, which refers back to {path}; let one of them hold its array")
        value = self.inside(owner, self._found(path, owner), (path, *behind))
        made = dataclasses.replace(reference, value=value)
        self._check(path, made)
        if reference.axes:
            return made if is_node(value) else made.materialize()
        return value

    def _found(self, path: str, owner: str) -> Any:
        """What stands at the owner's place."""
        leaf = next((p for p in _prefixes(owner) if p in self._leaves), None)
        if leaf is None:
            raise ValueError(
                f"{path}: refers to {owner}, which is not in the tree; {closest(owner, self._leaves)}. Keep both in "
                "one tree, or call jc.untie(tree) before a part of it is taken out"
            )
        found = self._leaves[leaf]
        for name in filter(None, owner[len(leaf) :].split("/")):
            inner = found[int(name)] if isinstance(found, tuple) and name.isdigit() else getattr(found, name, None)
            if inner is None:
                raise ValueError(
                    f"{path}: refers to {owner}, and {leaf} is {self._leaves[leaf]!r}, which has no {name!r} there; "
                    "call jc.untie(tree) before the owner is changed, or compress both anew"
                )
            found = inner
        return found

    def _check(self, path: str, reference: Reference) -> None:
        """Raise where the owner has another shape than it had."""
        if not reference.sizes:
            return
        try:
            shape = jax.eval_shape(lambda x: reference.turned(dense(x)), reference.value).shape
        except Exception:  # a half of a split tree has no shape, and needs none
            return
        if not reference.fits(shape):
            raise ValueError(
                f"{path}: refers to {reference.owner} as an array of shape {reference.sizes}, and found {shape} there; "
                f"give {reference.owner} its shape back, or tie them anew with jc.tie"
            )


def materialize(tree: PyTree, key: jax.Array | None = None) -> PyTree:
    """Replace every node by the dense array it stands for, nested nodes innermost first.

    Args:
      tree: any pytree; leaves that are not nodes are returned as they are.
      key: for nodes that sample. Each node gets a key of its own; without one, a node gives its mean or
        test-time value.

    Returns:
      The tree with dense arrays in place of nodes; a reference as the array of its owner.

    Raises:
      ValueError: if a reference leads to nothing, to something of another shape, or back to itself.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[1.0, -3.0], [0.5, 2.0]])
      >>> plan = jc.plan({"w": w}, [("w", jc.prune.Magnitude(sparsity=0.5))])
      >>> jc.materialize(jc.compress({"w": w}, plan))["w"].tolist()
      [[0.0, -3.0], [0.0, 2.0]]
    """
    leaves, treedef = jax.tree.flatten(untie(tree, whole=False), is_leaf=is_node)
    keys = [None] * len(leaves) if key is None else [jax.random.fold_in(key, i) for i in range(len(leaves))]
    # References last: of a node that samples, all uses see one sample.
    made = [x if isinstance(x, Reference) else dense(x, key=k) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.map(dense, untie(jax.tree.unflatten(treedef, made)), is_leaf=is_node)


def finalize(tree: PyTree) -> PyTree:
    """Turn training forms into storage forms, innermost first; storage forms stay as they are.

    Args:
      tree: any pytree.

    Returns:
      The tree with storage forms, such as ``Masked`` for a stochastic gate; ready for :func:`jcompress.save`. What
      leaves share they share still, where it is left in their forms.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.dynamic.Movement(sparsity=0.5)(jnp.array([1.0, -3.0]))
      >>> type(node).__name__, type(jc.finalize({"w": node})["w"]).__name__
      ('Scored', 'Masked')
    """
    tree = opened(tree)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_node)
    known = dict(zip([path for path, _ in paths(tree)], leaves, strict=True))
    parts = [x for node in leaves for x in references(node) if not x.axes and x.owner not in known]
    shared = {x.owner: x.sizes for x in parts if any(p in known for p in _prefixes(x.owner))}
    if not shared:
        return finalized(tree)
    resolve = _Resolution(known)
    found = settled({path: finalized(resolve.common(path, node, shared)) for path, node in known.items()})
    return jax.tree.unflatten(treedef, list(found.values()))
