"""Models of packages that build on ``equinox``."""

from __future__ import annotations

from typing import Any

import jax

from experiments.zoo.from_equinox import batched
from experiments.zoo.model import Entry, Model, integers, model, normal

KEY = jax.random.key(0)


def vit() -> Model:
    import equimo.models

    made = equimo.models.VisionTransformer(
        16, 3, 24, 4, 4, [2], reg_tokens=2, init_values=0.5, num_classes=5, ffn_layer="swiglu", qk_norm=True, key=KEY
    )
    return batched(made, normal(2, 3, 16, 16), inference=True)


def convnext() -> Model:
    import equimo.models

    made = equimo.models.ConvNeXt(3, depths=[1, 2], dims=[12, 20], num_classes=5, key=KEY)
    return batched(made, normal(2, 3, 16, 16), inference=True)


def mlla() -> Model:
    import equimo.models

    made = equimo.models.Mlla(16, 3, dim=16, patch_size=4, depths=[1, 1], num_heads=[2, 4], num_classes=5, key=KEY)
    return batched(made, normal(2, 3, 16, 16), inference=True)


def unet() -> Model:
    import pdequinox

    made = pdequinox.arch.ClassicUNet(2, 2, 1, hidden_channels=8, num_levels=2, key=KEY)
    return batched(made, normal(2, 2, 16, 16))


def fourier() -> Model:
    import pdequinox

    made = pdequinox.arch.ClassicFNO(1, 2, 1, hidden_channels=10, num_modes=5, num_blocks=2, key=KEY)
    return batched(made, normal(2, 2, 24))


def resnet() -> Model:
    import pdequinox

    made = pdequinox.arch.DilatedResNet(1, 2, 1, hidden_channels=12, num_blocks=2, key=KEY)
    return batched(made, normal(2, 2, 24))


def proteins() -> Model:
    import esm2quinox

    made = esm2quinox.ESM2(num_layers=2, embed_size=24, num_heads=4, token_dropout=True, key=KEY)
    return batched(made, integers(20, 2, 9))


def flow() -> Model:
    """Log-density of samples under a flow."""
    import equinox as eqx
    import flowjax.distributions
    import flowjax.flows

    made = flowjax.flows.coupling_flow(
        KEY, base_dist=flowjax.distributions.Normal(jax.numpy.zeros(4)), flow_layers=2, nn_width=20
    )
    arrays, static = eqx.partition(made, eqx.is_inexact_array)

    def fn(arrays: Any, x: jax.Array) -> jax.Array:
        return eqx.combine(arrays, static).log_prob(x)

    return model(fn, arrays, normal(6, 4))


ENTRIES = [
    Entry("ViT with SwiGLU", "equimo", vit),
    Entry("ConvNeXt", "equimo", convnext),
    Entry("MLLA", "equimo", mlla),
    Entry("U-Net", "pdequinox", unet),
    Entry("Fourier operator", "pdequinox", fourier),
    Entry("dilated ResNet", "pdequinox", resnet),
    Entry("ESM-2", "esm2quinox", proteins),
    Entry("coupling flow", "flowjax", flow),
]
