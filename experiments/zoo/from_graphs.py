"""Networks on graphs: ``jraph``, and equivariant ones of ``e3nn-jax``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.zoo.model import Entry, Model, integers, model, normal

KEY = jax.random.key(0)


def _graph(made: Any, edges: int | None = 4) -> Model:
    import haiku as hk
    import jraph

    def network(nodes: jax.Array, messages: Any, senders: jax.Array, receivers: jax.Array) -> jax.Array:
        graph = jraph.GraphsTuple(
            nodes, messages, receivers, senders, jnp.zeros((1, 3)), jnp.array([8]), jnp.array([12])
        )
        return made(hk)(graph).nodes

    args = (
        normal(8, 6),
        None if edges is None else normal(12, edges, seed=2),
        integers(8, 12),
        integers(8, 12, seed=3),
    )
    f = hk.without_apply_rng(hk.transform(network))
    return model(f.apply, f.init(KEY, *args), *args)


def message_passing() -> Model:
    import jraph

    def made(hk: Any) -> Any:
        def mlp(width: int) -> Any:
            return jraph.concatenated_args(lambda x: hk.nets.MLP([20, width], activation=jax.nn.silu)(x))

        def twice(graph: Any) -> Any:
            graph = jraph.GraphNetwork(mlp(12), mlp(16), mlp(10))(graph)
            return jraph.GraphNetwork(
                mlp(12), mlp(5), mlp(10), attention_logit_fn=_logits(hk), attention_reduce_fn=_times
            )(graph)

        return twice

    return _graph(made)


def _logits(hk: Any) -> Any:
    return lambda edges, sent, received, _: hk.Linear(1)(jnp.concatenate([edges, sent, received], axis=-1))


def _times(edges: jax.Array, weights: jax.Array) -> jax.Array:
    return edges * weights


def convolution() -> Model:
    import jraph

    def made(hk: Any) -> Any:
        def twice(graph: Any) -> Any:
            graph = jraph.GraphConvolution(lambda x: jax.nn.relu(hk.Linear(16)(x)), add_self_edges=True)(graph)
            return jraph.GraphConvolution(hk.Linear(4), symmetric_normalization=False)(graph)

        return twice

    return _graph(made, None)


def equivariant() -> Model:
    """A layer of messages on points in space, and a readout."""
    import e3nn_jax as e3nn
    import flax.linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, at: jax.Array, senders: jax.Array, receivers: jax.Array) -> jax.Array:
            x = e3nn.flax.Linear("8x0e + 4x1o")(e3nn.IrrepsArray("6x0e", x))
            edges = e3nn.spherical_harmonics("0e + 1o", e3nn.IrrepsArray("1o", at[senders] - at[receivers]), True)
            messages = e3nn.flax.Linear("12x0e + 5x1o")(e3nn.tensor_product(x[senders], edges))
            x = e3nn.scatter_sum(messages, dst=receivers, output_size=8) / 2
            x = e3nn.flax.MultiLayerPerceptron((10, 7), jax.nn.silu)(x.filter("0e"))
            return x.array

    args = (normal(8, 6), normal(8, 3, seed=2), jnp.arange(12) % 8, (jnp.arange(12) * 3 + 1) % 8)
    made = Layer()
    return model(made.apply, made.init(KEY, *args), *args)


ENTRIES = [
    Entry("graph network with attention", "jraph", message_passing),
    Entry("graph convolution", "jraph", convolution),
    Entry("equivariant messages", "e3nn-jax", equivariant),
]
