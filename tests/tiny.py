"""Tiny random pipelines of every family that is trained: built, not downloaded; `save_pretrained` makes a base of each.

Built alike each time after `torch.manual_seed`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz<>,.0123456789"
CLIP, CLIP_2, T5, PROJECTION = 8, 12, 24, 6
"""Widths of the text encoders, and of what the first two pool."""


def clip_tokenizer() -> Any:
    """A letter a token, 77 of them; words beyond the letters are unknown."""
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: k for k, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """A letter a token, as sentencepiece's unigrams."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS]
    return T5Tokenizer(vocab=[(piece, -float(k)) for k, piece in enumerate(pieces)], extra_ids=0, model_max_length=512)


def clip(tokenizer: Any, width: int, *, projected: bool) -> Any:
    """A CLIP text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(tokenizer: Any) -> Any:
    """A T5 encoder of one layer."""
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=T5, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def vae(**changes: Any) -> Any:
    """An autoencoder of four channels; a place stands for 2 x 2 pixels."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**settings, **changes})


def unet(**changes: Any) -> Any:
    """A UNet of two levels."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": CLIP,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **changes})


def sd1(prediction: str = "epsilon") -> Any:
    """Stable Diffusion 1.x: 16 x 16 pixels."""
    tokenizer = clip_tokenizer()
    absent: Any = None
    return _quiet(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip(tokenizer, CLIP, projected=False),
            tokenizer=tokenizer,
            unet=unet(),
            scheduler=_ddim(prediction),
            safety_checker=absent,
            feature_extractor=absent,
            requires_safety_checker=False,
        )
    )


def sd2() -> Any:
    """Stable Diffusion 2.x, which predicts velocity."""
    return sd1("v_prediction")


def sdxl(**changes: Any) -> Any:
    """Stable Diffusion XL: 16 x 16 pixels. changes: of the UNet."""
    first, second = clip_tokenizer(), clip_tokenizer()
    added: dict[str, Any] = {
        "cross_attention_dim": CLIP + CLIP_2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": PROJECTION + 6 * 4,
        "transformer_layers_per_block": (2, 1),
        "use_linear_projection": True,
    }
    return _quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=clip(first, CLIP, projected=False),
            text_encoder_2=clip(second, CLIP_2, projected=True),
            tokenizer=first,
            tokenizer_2=second,
            unet=unet(**{**added, **changes}),
            scheduler=_ddim("epsilon"),
        )
    )


def sd3(*, with_t5: bool = True) -> Any:
    """Stable Diffusion 3: 16 x 16 pixels."""
    first, second, third = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=T5,
        caption_projection_dim=8,
        pooled_projection_dim=2 * PROJECTION,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    absent: Any = None
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip(first, CLIP, projected=True),
            tokenizer=first,
            text_encoder_2=clip(second, CLIP_2, projected=True),
            tokenizer_2=second,
            text_encoder_3=t5(third) if with_t5 else absent,
            tokenizer_3=third if with_t5 else absent,
        )
    )


def flux(*, guided: bool = True) -> Any:
    """Flux.1-dev, or schnell: 256 x 256 pixels unless told otherwise."""
    first, second = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5,
        pooled_projection_dim=CLIP,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guided,
    )
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
            vae=vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip(first, CLIP, projected=False),
            tokenizer=first,
            text_encoder_2=t5(second),
            tokenizer_2=second,
            transformer=transformer,
        )
    )


def pixart() -> Any:
    """A transformer with cross-attention, whose texts (width 10) have a projection."""
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=8, caption_channels=10, sample_size=8, patch_size=2, norm_num_groups=2,
        use_additional_conditions=False,
    )  # fmt: skip


PIPELINES: Mapping[str, Callable[[], Any]] = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def _ddim(prediction: Any) -> Any:
    """With Stable Diffusion's betas. (SDXL's own, Euler, warns of numpy 2 in diffusers 0.42.1.)"""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        steps_offset=1,
        clip_sample=False,
    )


def _quiet(pipeline: Any) -> Any:
    """Without bars; its parts random, but large enough that every layer is heard in the picture."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for value in part.parameters():
                    if not value.any():  # what starts at zero: last layers of transformers, biases
                        value += torch.randn(value.shape, generator=generator) * 0.1
    return pipeline
