"""Small dense models of the zoo in plain jax: gates, control flow, custom derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from zoo_entry import Built, Entry, dense_count, features, randomize
from zoo_plain import dense, dense_params

CLASSES = 3


def mlp():
    def fn(p, x):
        x = jax.nn.relu(dense(p["first"], x))
        x = jax.nn.gelu(dense(p["second"], x))
        return dense(p["head"], x)

    params = {"first": dense_params(5, 12), "second": dense_params(12, 10), "head": dense_params(10, CLASSES)}
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(0)),
        args=features(5),
        widths={"first": ("first/kernel", 1), "second": ("second/kernel", 1)},
        sizes={"first": 12, "second": 10},
        count=lambda first, second: dense_count(5, first) + dense_count(first, second) + dense_count(second, CLASSES),
    )


def gates():
    """A softmax and a sum of sigmoids over hidden units: cut units still count in both, each with what zero gives."""

    def fn(p, x):
        hidden = jax.nn.gelu(dense(p["first"], x))
        attention = jax.nn.softmax(dense(p["attention"], hidden), axis=-1)
        strength = jnp.sum(jax.nn.sigmoid(dense(p["strength"], hidden)), axis=-1, keepdims=True)
        return dense(p["head"], attention) * strength

    params = {
        "first": dense_params(5, 12),
        "attention": dense_params(12, 10),
        "strength": dense_params(12, 8),
        "head": dense_params(10, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(65)),
        args=features(5),
        widths={name: (f"{name}/kernel", 1) for name in ("first", "attention", "strength")},
        sizes={"first": 12, "attention": 10, "strength": 8},
        count=lambda first, attention, strength: (
            dense_count(5, first)
            + dense_count(first, attention)
            + dense_count(first, strength)
            + dense_count(attention, CLASSES)
        ),
        optional={
            "attention": "a softmax over the cut axis counts the cut units, and its maximum may be theirs",
            "strength": "a sum of sigmoids counts one half for each cut unit",
        },
    )


def control():
    """Branches and a loop whose number of turns depends on the data, around one hidden state."""

    def fn(p, x):
        hidden = jax.nn.relu(dense(p["first"], x))
        hidden = lax.cond(
            jnp.sum(x) > 0,
            lambda h: h + dense(p["branch_1"], jax.nn.relu(dense(p["branch_0"], h))),
            lambda h: 0.5 * h @ p["other"]["kernel"],
            hidden,
        )

        def again(state):
            turn, h = state
            return (turn < 4) & (jnp.sum(jnp.square(h)) < 1e3)

        def turn(state):
            i, h = state
            return i + 1, h + jnp.tanh(dense(p["loop_1"], jax.nn.gelu(dense(p["loop_0"], h))))

        _, hidden = lax.while_loop(again, turn, (0, hidden))
        return dense(p["head"], hidden)

    params = {
        "first": dense_params(5, 12),
        "branch_0": dense_params(12, 9),
        "branch_1": dense_params(9, 12),
        "other": {"kernel": jnp.zeros((12, 12))},
        "loop_0": dense_params(12, 7),
        "loop_1": dense_params(7, 12),
        "head": dense_params(12, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(8)),
        args=features(5),
        widths={"hidden": ("first/kernel", 1), "branch": ("branch_0/kernel", 1), "loop": ("loop_0/kernel", 1)},
        sizes={"hidden": 12, "branch": 9, "loop": 7},
        count=lambda hidden, branch, loop: (
            dense_count(5, hidden)
            + dense_count(hidden, branch)
            + dense_count(branch, hidden)
            + hidden * hidden
            + dense_count(hidden, loop)
            + dense_count(loop, hidden)
            + dense_count(hidden, CLASSES)
        ),
        reverse=False,
    )


@jax.custom_vjp
def binarize(x):
    """Plus or minus one; backward the identity where the input lies in [-1, 1]."""
    return jnp.where(x >= 0, 1.0, -1.0)


binarize.defvjp(lambda x: (binarize(x), x), lambda x, g: (jnp.where(jnp.abs(x) <= 1, g, 0.0),))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def spike(x, sharpness):
    """Zero or one; its derivative is that of a sigmoid."""
    return (x > 0).astype(x.dtype)


@spike.defjvp
def _spike_jvp(sharpness, primals, tangents):
    gate = jax.nn.sigmoid(sharpness * primals[0])
    return spike(primals[0], sharpness), sharpness * gate * (1 - gate) * tangents[0]


def straight_through():
    def fn(p, x):
        x = binarize(dense(p["first"], x))
        x = spike(dense(p["second"], x), 2.0)
        x = jax.nn.silu(dense(p["third"], x))
        return dense(p["head"], x)

    params = {
        "first": dense_params(5, 12),
        "second": dense_params(12, 10),
        "third": dense_params(10, 8),
        "head": dense_params(8, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(9)),
        args=features(5),
        widths={name: (f"{name}/kernel", 1) for name in ("first", "second", "third")},
        sizes={"first": 12, "second": 10, "third": 8},
        count=lambda first, second, third: (
            dense_count(5, first)
            + dense_count(first, second)
            + dense_count(second, third)
            + dense_count(third, CLASSES)
        ),
    )


ENTRIES = [
    Entry("mlp-plain", mlp),
    Entry("gates-plain", gates),
    Entry("control-plain", control),
    Entry("straight-through-plain", straight_through),
]
