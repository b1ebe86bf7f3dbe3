"""diffusers pipelines of every class that is carried, with random weights and sides of a few pixels.

For trying code before a model of gigabytes is there, for tests without a network, and for the examples in the docs: the
classes, schedulers and conventions are the real ones, the pictures are noise.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch

from sfumato.core import InputError
from sfumato.interop._needs import need

WIDTH = 16  # of text features


def pipeline(kind: str, scheduler: Any = None, seed: int = 0, **options: Any) -> Any:
    """A random diffusers pipeline: one of KINDS, with this scheduler (default: the kind's usual one)."""
    if kind not in KINDS:
        raise InputError(f"kind = {kind!r}: one of {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = KINDS[kind](need("diffusers"), scheduler, **options)
    made.set_progress_bar_config(disable=True)
    return made


def unet(d: Any, **options: Any) -> Any:
    """An unconditional U-Net of 8 x 8 pixels."""
    facts = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return d.UNet2DModel(**{**facts, **options}).eval()


def text_unet(d: Any, **options: Any) -> Any:
    """A text-conditional U-Net of 8 x 8 latents."""
    facts = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return d.UNet2DConditionModel(**{**facts, **options}).eval()


def autoencoder(d: Any, **options: Any) -> Any:
    """A KL autoencoder of factor 2, whose codes have a standard deviation of about 1."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    facts = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 4.0, **blocks}
    return d.AutoencoderKL(**{**facts, **options}).eval()


def clip(projected: bool = False) -> tuple[Any, Any]:
    """(text encoder, tokenizer): CLIP of two layers, spelling letter by letter."""
    transformers = need("transformers")
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    tokenizer = transformers.CLIPTokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=16, pad_token="<|endoftext|>"
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval(), tokenizer


def t5(width: int = WIDTH) -> tuple[Any, Any]:
    """(text encoder, tokenizer): T5 of one layer, spelling letter by letter."""
    transformers = need("transformers")
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        *((c, -3.0) for c in string.ascii_lowercase),
    ]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)
    config = transformers.T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval(), tokenizer


def _pixels(d: Any, scheduler: Any = None, **options: Any) -> Any:
    return d.DDPMPipeline(unet(d, **options), scheduler or d.DDPMScheduler())


def _sd(d: Any, scheduler: Any = None, kind: str = "StableDiffusionPipeline", extra: Any = None, **options: Any) -> Any:
    encoder, tokenizer = clip()
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **(extra or {})}
    usual = d.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return getattr(d, kind)(
        vae=autoencoder(d),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=text_unet(d, **options),
        scheduler=scheduler or usual,
        **parts,
    )


def _inpaint(d: Any, scheduler: Any = None) -> Any:
    return _sd(d, scheduler, "StableDiffusionInpaintPipeline", in_channels=9)


def _instruct(d: Any, scheduler: Any = None) -> Any:
    return _sd(d, scheduler, "StableDiffusionInstructPix2PixPipeline", in_channels=8)


def _control(d: Any, scheduler: Any = None) -> Any:
    made = _sd(d, scheduler)
    control = d.ControlNetModel.from_unet(
        made.unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8)
    ).eval()
    for p in control.parameters():  # its last layers begin at zero: give it something to say
        torch.nn.init.normal_(p, std=0.1) if not p.any() else None
    parts = {k: v for k, v in made.components.items() if k != "image_encoder"}
    return d.StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)


def _sdxl(d: Any, scheduler: Any = None, **options: Any) -> Any:
    (one, tokens), (two, tokens_two) = clip(), clip(projected=True)
    net = text_unet(
        d,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        **options,
    )
    usual = d.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    return d.StableDiffusionXLPipeline(
        vae=autoencoder(d),
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=tokens,
        tokenizer_2=tokens_two,
        unet=net,
        scheduler=scheduler or usual,
        add_watermarker=False,
    )


def _sd3(d: Any, scheduler: Any = None) -> Any:
    (one, tokens), (two, tokens_two), (three, tokens_three) = clip(projected=True), clip(projected=True), t5(2 * WIDTH)
    net = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    return d.StableDiffusion3Pipeline(
        transformer=net.eval(),
        scheduler=scheduler or d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_autoencoder(d),
        text_encoder=one,
        tokenizer=tokens,
        text_encoder_2=two,
        tokenizer_2=tokens_two,
        text_encoder_3=three,
        tokenizer_3=tokens_three,
    )


def _flux(d: Any, scheduler: Any = None, distilled: bool = True) -> Any:
    (one, tokens), (two, tokens_two) = clip(), t5()
    net = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4),
    )
    usual = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    made = d.FluxPipeline(
        transformer=net.eval(),
        scheduler=scheduler or usual,
        vae=_flow_autoencoder(d),
        text_encoder=one,
        tokenizer=tokens,
        text_encoder_2=two,
        tokenizer_2=tokens_two,
    )
    made.default_sample_size = 8
    return made


def _flow_autoencoder(d: Any) -> Any:
    return autoencoder(d, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def _pixart(d: Any, scheduler: Any = None) -> Any:
    encoder, tokenizer = t5()
    net = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    usual = d.DPMSolverMultistepScheduler()
    return d.PixArtAlphaPipeline(
        transformer=net.eval(),
        vae=autoencoder(d),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler or usual,
    )


def _dit(d: Any, scheduler: Any = None, **options: Any) -> Any:
    facts = {
        "sample_size": 8,
        "num_layers": 1,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_embeds_ada_norm": 1000,
    }
    net = d.DiTTransformer2DModel(**{**facts, **options})
    return d.DiTPipeline(net.eval(), autoencoder(d), scheduler or d.DDIMScheduler(clip_sample=False))


def _vq(d: Any, scheduler: Any = None) -> Any:
    codec = d.VQModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
        vq_embed_dim=3,
        scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return d.LDMPipeline(codec.eval(), unet(d), scheduler or d.DDIMScheduler(clip_sample=False))


KINDS: dict[str, Callable[..., Any]] = {
    "pixels": _pixels,
    "sd": _sd,
    "inpaint": _inpaint,
    "instruct": _instruct,
    "control": _control,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "dit": _dit,
    "vq": _vq,
}
