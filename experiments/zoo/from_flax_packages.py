"""Models of packages that build on ``flax``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.zoo.model import Entry, Model, model, normal

KEY = jax.random.key(0)


def resnet(kind: str) -> Model:
    """ResNet-18, ResNet-D and ResNeSt of ``jax-resnet`` at a few channels."""
    import jax_resnet as jr

    block = {"": jr.ResNetBlock, "D": jr.ResNetDBlock, "St": jr.ResNeStBottleneckBlock}[kind]
    stem = jr.ResNetStem if not kind else jr.ResNetDStem
    made = jr.ResNet(block, stage_sizes=[1, 1], n_classes=5, hidden_sizes=(8, 12), stem_cls=stem)
    variables = made.init(KEY, normal(2, 16, 16, 3))
    return model(lambda v, x: made.apply(v, x, mutable=False), variables, normal(2, 16, 16, 3))


def stylegan() -> Model:
    """The mapping network, two modulated layers and the colors; resampling does not run on a JAX without newshape=."""
    import flax.linen as nn
    import flaxmodels.stylegan2.generator as parts

    class Generator(nn.Module):
        @nn.compact
        def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
            w = parts.MappingNetwork(12, 0, 18, layer_features=20, num_ws=3, num_layers=2)(z, train=False)
            for i in range(2):
                x = parts.SynthesisLayer(14, 3, i, res=3)(x, w, noise_mode="none")
            return parts.ToRGBLayer(3, 2)(x, None, w)

    args = (normal(2, 12), normal(2, 8, 8, 6, seed=2))
    made = Generator()
    return model(made.apply, made.init(KEY, *args), *args)


def unet() -> Model:
    """The denoiser of latent diffusion."""
    from diffusers import FlaxUNet2DConditionModel

    made = FlaxUNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,), layers_per_block=1, attention_head_dim=2, cross_attention_dim=12,
    )  # fmt: skip
    params = made.init_weights(KEY)

    def fn(params: Any, x: jax.Array, words: jax.Array) -> jax.Array:
        return made.apply({"params": params}, x, jnp.array([3, 700]), words).sample

    return model(fn, params, normal(2, 4, 8, 8), normal(2, 5, 12, seed=2))


def autoencoder() -> Model:
    from diffusers import FlaxAutoencoderKL

    made = FlaxAutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        sample_size=8, latent_channels=4,
    )  # fmt: skip
    params = made.init_weights(KEY)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return made.apply({"params": params}, x, deterministic=True).sample

    return model(fn, params, normal(2, 3, 8, 8))


ENTRIES = [
    Entry("ResNet", "jax-resnet", lambda: resnet("")),
    Entry("ResNet-D", "jax-resnet", lambda: resnet("D")),
    Entry("ResNeSt", "jax-resnet", lambda: resnet("St")),
    Entry("StyleGAN2 generator", "flaxmodels", stylegan),
    Entry("latent diffusion U-Net", "diffusers", unet),
    Entry("autoencoder", "diffusers", autoencoder),
]
