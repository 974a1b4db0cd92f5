"""Low rank under another norm than that of the weights: of the outputs, or of the loss."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.subspaces import check_rank
from jcompress.factorize.svd import chosen_rank
from jcompress.formats import LowRank, TensorNetwork
from jcompress.formats.lowrank import truncated_svd
from jcompress.formats.network import contract, mode_sizes, refitted
from jcompress.layers import matrices
from jcompress.numeric import scaling

_HIGH = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class WhitenedSVD(Method):
    """The low rank that moves the outputs least over the calibration data: least ``tr(dW^T gram dW)``.

    With ``gram = R R^T``, the best approximation of ``R^T W``, times ``R^-T``: closed, and never worse in the outputs
    than :class:`SVD` of the same rank (Chen et al. 2021, DRONE; Wang et al. 2024, arXiv:2403.07378). ``R`` comes from
    eigenvectors, so Gram matrices that are singular do no harm: what was never met, and is therefore free, is fitted as
    much as ``damping`` weighs it. Needs the statistic ``gram``. Gathers a sharded matrix, once.

    Attributes:
      rank: the rank, or the share of the numbers that is kept, in (0, 1).
      damping: added to the Gram matrix, as a fraction of its mean diagonal.

    Raises:
      ValueError: for a rank above the limit, or statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> plan = jc.plan(params, [("w", jc.factorize.WhitenedSVD(rank=1, damping=1e-6))])
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[0.1, 10.0]])], plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].materialize().round(2)[1].tolist()
      [0.029999999329447746, 1.0]
    """

    rank: int | float
    damping: float = 1e-4

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    roots: ClassVar[str] = "eigenvectors"

    def __post_init__(self) -> None:
        check_rank("WhitenedSVD", self.rank)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix or the rank exceeds its smaller side."""
        chosen_rank("WhitenedSVD", path, self.rank, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> LowRank:
        """The node for one array."""
        return _by_gram("WhitenedSVD", self.rank, w, context, partial(_under, damping=self.damping))


@dataclasses.dataclass(frozen=True)
class PrincipalComponents(Method):
    """The principal components of the inputs that the outputs depend on most; the others are cut off.

    With eigenvectors ``u_i`` and eigenvalues ``l_i`` of the Gram matrix, component i is worth ``l_i ||u_i^T W||**2``,
    the squared error of the outputs without it, and these errors add up (Levin, Leen & Moody 1994). The first factor
    holds the components that stay, orthonormal, the second what is made of them. Components are those of the inputs
    alone, so :class:`WhitenedSVD` of a rank is never worse in the outputs. Needs the statistic ``gram``. Gathers a
    sharded matrix, once.

    Attributes:
      rank: how many components stay, or the share of the numbers that is kept, in (0, 1).

    Raises:
      ValueError: for a rank above the limit, or statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> stats = jc.trace.Stats(gram=jnp.diag(jnp.array([1.0, 100.0, 4.0])), axes=(0,))
      >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> jc.factorize.PrincipalComponents(rank=1)(w, jc.Context(stats=stats)).materialize().round(3).tolist()
      [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """

    rank: int | float

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    roots: ClassVar[str] = "eigenvectors"

    def __post_init__(self) -> None:
        check_rank("PrincipalComponents", self.rank)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix or the rank exceeds its smaller side."""
        chosen_rank("PrincipalComponents", path, self.rank, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> LowRank:
        """The node for one array."""
        return _by_gram("PrincipalComponents", self.rank, w, context, _components)


def _by_gram(name: str, rank: Any, w: jax.Array, context: Context, factors: Callable[..., Any]) -> LowRank:
    """The node of two factors, which ``factors(matrix, gram, rank=)`` finds for each layer of an array."""
    layer, gram = matrices.of(w, context, "gram")
    rank = chosen_rank(name, context.path, rank, w.shape[layer.lead :])
    u, v = jax.vmap(partial(factors, rank=rank))(layer.matrix(), gram)
    u = u.reshape(*w.shape[:-1], rank).astype(w.dtype)
    return LowRank(u, v.reshape(*w.shape[: layer.lead], rank, w.shape[-1]).astype(w.dtype))


def _components(w: jax.Array, gram: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The eigenvectors of a Gram matrix that a float32 (k, n) depends on most, and what it makes of them."""
    values, vectors = jnp.linalg.eigh(gram)
    unit = scaling.unit([w])
    turned = jnp.matmul(vectors.T, unit.divide(w), precision=_HIGH)
    worth = jnp.maximum(values, 0) * jnp.sum(jnp.square(turned), axis=1)
    stay = jnp.sort(jnp.argsort(worth, descending=True)[:rank])
    return vectors[:, stay], unit.multiply(turned[stay])


def _under(w: jax.Array, gram: jax.Array, rank: int, damping: float) -> tuple[jax.Array, jax.Array]:
    """Factors of the best approximation of a float32 (k, n) where a change counts ``tr(dW^T gram dW)``."""
    values, vectors = jnp.linalg.eigh(gram)
    mean = jnp.maximum(jnp.mean(jnp.diagonal(gram)), jnp.finfo(jnp.float32).tiny)
    roots = jnp.sqrt(jnp.maximum(values, 0) / mean + max(damping, 1e-12))[:, None]
    # In the eigenvectors' coordinates the root is diagonal.
    unit = scaling.unit([w])
    turned = roots * jnp.matmul(vectors.T, unit.divide(w), precision=_HIGH)
    u, v = truncated_svd(turned, rank)
    return jnp.matmul(vectors, u / roots, precision=_HIGH) * unit.root, v * unit.root


@dataclasses.dataclass(frozen=True)
class Whitened(Method):
    """Any factorization, fitted to the weights in the units of what they meet: errors count as they move the outputs.

    The inputs are multiplied by a root of their Gram matrix, the method is fitted, and its inverse goes into the factor
    that has the inputs, so the node keeps its form and size. For :class:`SVD` of a dense layer this is
    :class:`WhitenedSVD`. Of a convolution the Gram matrix of the channels is taken first, over all places of the
    window, and then the factors of a ``TensorNetwork`` are refitted in the Gram matrix of all that the window sees:
    what the outputs move is least squares with one fixed factor more. Needs the statistic ``gram``. For low rank by
    Wang et al. 2024, arXiv:2403.07378. A sharded array is gathered where the method does it.

    Attributes:
      method: one that gives ``TensorNetwork`` or ``LowRank`` and has the inputs as one mode of one factor.
      damping: added to the Gram matrix, as a fraction of its mean diagonal.
      sweeps: of alternating least squares over all that a window sees.

    Raises:
      ValueError: if the node has no factor with the whole inputs, or statistics are missing or of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> x = jax.random.normal(jax.random.key(0), (200, 8)) * jnp.logspace(-2, 1, 8)
      >>> params = {"w": jax.random.normal(jax.random.key(1), (8, 6))}
      >>> errors = []
      >>> for method in (jc.factorize.CP(rank=3), jc.factorize.Whitened(jc.factorize.CP(rank=3))):
      ...     plan = jc.plan(params, [("w", method)])
      ...     stats = jc.calibrate(lambda p, x: x @ p["w"], params, [x], statistics=["gram", "count"])
      ...     w = jc.compress(params, plan, stats=stats)["w"].materialize()
      ...     errors.append(float(jnp.linalg.norm(x @ (w - params["w"]))))
      >>> errors[1] < 0.5 * errors[0]
      True
    """

    method: Method
    damping: float = 1e-3
    sweeps: int = 5

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    roots: ClassVar[str] = "eigenvectors"
    wraps: ClassVar[tuple[str, ...]] = ("method",)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Any:
        """The node for one array."""
        _, gram = matrices.of(w, context, "gram")
        root, inverse = _roots(_of_channels(gram[0], w.shape[-2]), self.damping)
        turned = jnp.matmul(root, w.astype(jnp.float32), precision=_HIGH)
        inner = dataclasses.replace(context, stats=None, grad=None)
        node = core.fit(self.method, [turned.astype(w.dtype)], [inner])[0]
        if w.ndim > 2 and self.sweeps and isinstance(node, TensorNetwork) and not any(map(core.is_node, node.factors)):
            node = _swept(node, turned, inverse, gram[0], self.damping, self.sweeps)
        return _unturned(node, inverse, context.path, w.ndim)


@partial(jax.jit, static_argnames=("damping", "sweeps"))
def _swept(
    node: TensorNetwork, w: jax.Array, inverse: jax.Array, gram: jax.Array, damping: float, sweeps: int
) -> TensorNetwork:
    """The factors refitted so that the outputs of a convolution move least, in the inputs' turned coordinates."""
    root, _ = _roots(gram, damping)
    root = jnp.matmul(root.reshape(*root.shape[:1], -1, len(inverse)), inverse, precision=_HIGH)
    terms, output = node.equation.split("->")
    sizes = mode_sizes(node.equation, node.factors)
    inputs, outputs = output[: sum(node.merged[:-1])], output[sum(node.merged[:-1]) :]
    row = next(x for x in string.ascii_letters if x not in node.equation)
    root = root.reshape(len(gram), *(sizes[m] for m in inputs))
    w = contract(f"{row}{inputs},{output}->{row}{outputs}", root, w.reshape([sizes[m] for m in output]))
    equation = f"{terms},{row}{inputs}->{row}{outputs}"
    factors = refitted(equation, [*node.factors, root], w, sweeps, held=1)[:-1]
    return dataclasses.replace(
        node, factors=tuple(x.astype(old.dtype) for x, old in zip(factors, node.factors, strict=True))
    )


def _of_channels(gram: jax.Array, channels: int) -> jax.Array:
    """The Gram matrix of the input channels of a convolution, those of all places of its window added up."""
    places = gram.shape[-1] // channels
    return jnp.einsum("pcpd->cd", gram.reshape(places, channels, places, channels))


def _roots(gram: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """The symmetric root of a damped Gram matrix, of mean diagonal 1, and its inverse."""
    values, vectors = jnp.linalg.eigh(gram)
    mean = jnp.maximum(jnp.mean(jnp.diagonal(gram)), jnp.finfo(jnp.float32).tiny)
    roots = jnp.sqrt(jnp.maximum(values, 0) / mean + max(damping, 1e-12))
    root, inverse = (jnp.matmul(vectors * r, vectors.T, precision=_HIGH) for r in (roots, 1 / roots))
    return root, inverse


def _unturned(node: Any, inverse: jax.Array, path: str, ndim: int) -> Any:
    """The node with a matrix over its inputs multiplied into the factor that has them."""
    if isinstance(node, LowRank) and not core.is_node(node.u):
        u = jnp.matmul(inverse, node.u.astype(jnp.float32), precision=_HIGH).astype(node.u.dtype)
        return dataclasses.replace(node, u=u)
    if isinstance(node, TensorNetwork):
        terms, output = node.equation.split("->")
        end = sum(node.merged[: ndim - 2])
        modes = output[end : end + node.merged[ndim - 2]]
        places = [i for i, term in enumerate(terms.split(",")) if modes in term]
        if len(modes) == 1 and len(places) == 1 and not core.is_node(node.factors[places[0]]):
            (place,), factors = places, list(node.factors)
            axis = terms.split(",")[place].index(modes)
            moved = jnp.tensordot(inverse, factors[place].astype(jnp.float32), axes=(1, axis), precision=_HIGH)
            factors[place] = jnp.moveaxis(moved, 0, axis).astype(factors[place].dtype)
            return dataclasses.replace(node, factors=tuple(factors))
    raise ValueError(
        f"{path}: Whitened found {node!r}, expected LowRank or TensorNetwork with the inputs as one mode of one factor "
        "of arrays; quantize after it, jc.chain(jc.factorize.Whitened(...), ...)"
    )


@dataclasses.dataclass(frozen=True)
class FisherSVD(Method):
    """The low rank that moves the loss least, if the weights of an input count alike (Hsu 2022, arXiv:2207.00112).

    Each row is weighed by the root of the sum of its squared gradients, and the weights divided out again. Needs the
    statistic ``grad_square``, from ``jc.calibrate(loss, params, batches, plan=plan)``. Gathers a sharded matrix, once.

    Attributes:
      rank: the rank, or the share of the numbers that is kept, in (0, 1).

    Raises:
      ValueError: for a rank above the limit, or if the statistic is missing.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> stats = jc.trace.Stats(grad_square=jnp.array([[0.0001, 0.0], [100.0, 0.0]]))
      >>> node = jc.factorize.FisherSVD(rank=1)(jnp.array([[3.0, 0.0], [0.0, 1.0]]), jc.Context(stats=stats))
      >>> node.materialize().round(2).tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """

    rank: int | float

    reads: ClassVar[tuple[str, ...]] = ("stats.grad_square",)

    def __post_init__(self) -> None:
        check_rank("FisherSVD", self.rank)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix or the rank exceeds its smaller side."""
        chosen_rank("FisherSVD", path, self.rank, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> LowRank:
        """The node for one array."""
        rank = chosen_rank("FisherSVD", context.path, self.rank, w.shape)
        matrix = w.reshape(-1, w.shape[-1]).astype(jnp.float32)
        rows = jnp.asarray(context.stats.grad_square, jnp.float32).reshape(matrix.shape).sum(1)
        # Rows without gradients count a little, or their weights would be lost.
        weights = jnp.sqrt(jnp.maximum(rows, 1e-6 * jnp.mean(rows)))[:, None]
        weights = jnp.where(jnp.max(weights, initial=0) > 0, weights, 1)
        unit = scaling.unit([matrix])
        u, v = truncated_svd(weights * unit.divide(matrix), rank)
        u, v = u / weights * unit.root, v * unit.root
        return LowRank(u.reshape(*w.shape[:-1], rank).astype(w.dtype), v.astype(w.dtype))
