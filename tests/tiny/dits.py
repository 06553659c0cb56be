"""Image families around a transformer: Stable Diffusion 3, Flux and Qwen-Image with their variants, and the others."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from .family import Family, asking, assemble, editing, loud, seeded, vae
from .text import (
    WIDTH,
    bert,
    bert_tokenizer,
    clip,
    clip_tokenizer,
    gemma,
    gemma_tokenizer,
    glm,
    qwen3,
    qwen_processor,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_tokenizer,
    umt5,
)

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SHIFTED = {"shift_factor": 0.1, "scaling_factor": 0.5}
SHALLOW = {"num_layers": 1}


def flow(**extra: Any) -> FlowMatchEulerDiscreteScheduler:
    """The flow-matching sampler most transformers use."""
    return FlowMatchEulerDiscreteScheduler(**extra)


def clip_and_t5() -> dict[str, Any]:
    """The two text encoders of Flux."""
    parts = {"text_encoder": clip(), "tokenizer": clip_tokenizer()}
    return parts | {"text_encoder_2": t5(), "tokenizer_2": t5_tokenizer()}


def sd3(cls: type[DiffusionPipeline], control: bool = False) -> DiffusionPipeline:
    """A Stable Diffusion 3 pipeline with its three text encoders."""
    sizes = HEADS | {
        "attention_head_dim": 8,
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "pos_embed_max_size": 8,
    }
    sizes |= {"caption_projection_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 2 * WIDTH}
    parts = {"transformer": loud(diffusers.SD3Transformer2DModel, **sizes, out_channels=4, num_layers=2)}
    for i, suffix in enumerate(("", "_2", "_3")):
        parts["text_encoder" + suffix] = t5() if i == 2 else clip(projection=True)
        parts["tokenizer" + suffix] = t5_tokenizer() if i == 2 else clip_tokenizer()
    if control:
        parts["controlnet"] = loud(diffusers.SD3ControlNetModel, **sizes, **SHALLOW)
    return assemble(cls, **parts, vae=vae(**SHIFTED), scheduler=flow(shift=3.0))


def flux(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A Flux pipeline with distilled guidance beside true guidance."""
    transformer = loud(
        diffusers.FluxTransformer2DModel,
        **HEADS,
        **SHALLOW,
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    shift = flow(shift=3.0, use_dynamic_shifting=True)
    return assemble(cls, **clip_and_t5(), transformer=transformer, vae=vae(**SHIFTED), scheduler=shift)


def chroma() -> DiffusionPipeline:
    """A Chroma pipeline: Flux without pooled text, its modulation distilled into one network."""
    transformer = loud(
        diffusers.ChromaTransformer2DModel,
        **HEADS,
        **SHALLOW,
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    parts = {"text_encoder": t5(), "tokenizer": t5_tokenizer(), "vae": vae(**SHIFTED)}
    return assemble(diffusers.ChromaPipeline, **parts, transformer=transformer, scheduler=flow())


def pixart(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A PixArt pipeline: noise prediction with a learned variance that the pipeline throws away."""
    sizes = HEADS | {"attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 32, "sample_size": 8}
    transformer = loud(diffusers.PixArtTransformer2DModel, **sizes, **SHALLOW)
    parts = {"text_encoder": t5(), "tokenizer": t5_tokenizer(), "vae": vae()}
    return assemble(cls, **parts, transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler())


def deep_compression() -> diffusers.AutoencoderDC:
    """Sana's autoencoder with one level of pixel shuffling."""
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    depths = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    return seeded(diffusers.AutoencoderDC, latent_channels=4, scaling_factor=0.5, **widths, **depths, **scales)


def sana(cls: type[DiffusionPipeline], scheduler: Any, **extra: Any) -> DiffusionPipeline:
    """A Sana pipeline; the class and the scheduler tell the many-step model from the sprinting one."""
    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    sizes |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = loud(diffusers.SanaTransformer2DModel, **sizes, **SHALLOW, caption_channels=WIDTH, **extra)
    parts = {"text_encoder": gemma(), "tokenizer": gemma_tokenizer(), "vae": deep_compression()}
    return assemble(cls, **parts, transformer=transformer, scheduler=scheduler())


def sana_solver() -> diffusers.DPMSolverMultistepScheduler:
    """The flow solver Sana ships with."""
    flows = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return diffusers.DPMSolverMultistepScheduler(**flows)


def qwen_vae(halvings: int) -> diffusers.AutoencoderKLQwenImage:
    """A video autoencoder used on one frame."""
    moments = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    sizes = {"base_dim": 4, "dim_mult": [1] * (halvings + 1), "num_res_blocks": 0}
    sizes |= {"temperal_downsample": [False] * halvings}
    return loud(diffusers.AutoencoderKLQwenImage, gain=1.4, z_dim=4, **sizes, **moments)


def qwen(cls: type[DiffusionPipeline], halvings: int, **extra: Any) -> DiffusionPipeline:
    """A Qwen-Image pipeline, its prompts read by the vision-language model, the template's opening dropped."""
    rope = {"axes_dims_rope": (4, 4, 8), "joint_attention_dim": WIDTH}
    transformer = loud(
        diffusers.QwenImageTransformer2DModel, **HEADS, **SHALLOW, **rope, in_channels=16, out_channels=4
    )
    parts = {"text_encoder": qwen_vl(), "tokenizer": qwen_tokenizer(), "vae": qwen_vae(halvings)}
    shift = flow(use_dynamic_shifting=True)
    parts |= {name: make() for name, make in extra.items()}
    pipe = assemble(cls, **parts, transformer=transformer, scheduler=shift)
    opening = pipe.prompt_template_encode.split("<|vision_start|>")[0].split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(parts["tokenizer"](opening).input_ids)
    return pipe


def aura_flow() -> DiffusionPipeline:
    """An AuraFlow pipeline."""
    sizes = HEADS | {"attention_head_dim": 8, "caption_projection_dim": 16, "joint_attention_dim": 32, "sample_size": 8}
    layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 64}
    transformer = loud(diffusers.AuraFlowTransformer2DModel, **sizes, **layers)
    parts = {"text_encoder": umt5(), "tokenizer": t5_tokenizer(), "vae": vae(), "transformer": transformer}
    return assemble(diffusers.AuraFlowPipeline, **parts, scheduler=flow(shift=1.7))


def lumina2() -> DiffusionPipeline:
    """A Lumina 2 pipeline, which takes an eight times smaller latent for granted."""
    sizes = {"hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
    rope = {"axes_dim_rope": (4, 4, 4), "axes_lens": (512, 16, 16), "multiple_of": 8}
    transformer = loud(
        diffusers.Lumina2Transformer2DModel, **sizes, **rope, in_channels=4, sample_size=4, cap_feat_dim=WIDTH
    )
    parts = {"text_encoder": gemma(), "tokenizer": gemma_tokenizer(), "vae": vae(4, **SHIFTED)}
    return assemble(diffusers.Lumina2Pipeline, **parts, transformer=transformer, scheduler=flow(shift=6.0))


def z_image() -> DiffusionPipeline:
    """A Z-Image pipeline, whose transformer takes lists of latents and captions."""
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    rope = {"axes_dims": [8, 4, 4], "axes_lens": [512, 32, 32]}
    transformer = loud(diffusers.ZImageTransformer2DModel, **sizes, **rope, cap_feat_dim=WIDTH)
    parts = {"text_encoder": qwen3(), "tokenizer": qwen_tokenizer(), "vae": vae(**SHIFTED)}
    return assemble(diffusers.ZImagePipeline, **parts, transformer=transformer, scheduler=flow(shift=3.0))


def cogview4() -> DiffusionPipeline:
    """A CogView 4 pipeline with size embeddings beside the text."""
    sizes = HEADS | {"in_channels": 4, "out_channels": 4, "text_embed_dim": WIDTH, "sample_size": 8}
    more = {"time_embed_dim": 16, "condition_dim": 4, "pos_embed_max_size": 8, "rope_axes_dim": (8, 8)}
    parts = {"transformer": loud(diffusers.CogView4Transformer2DModel, **sizes, **SHALLOW, **more)}
    parts |= {"text_encoder": glm(), "tokenizer": gemma_tokenizer(), "vae": vae(**SHIFTED)}
    shift = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    return assemble(diffusers.CogView4Pipeline, **parts, scheduler=shift)


def hunyuan_dit() -> DiffusionPipeline:
    """A Hunyuan-DiT pipeline, bilingual through BERT and T5."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "num_layers": 2, "patch_size": 2}
    text = {"cross_attention_dim": WIDTH, "cross_attention_dim_t5": 32, "pooled_projection_dim": 8}
    transformer = loud(
        diffusers.HunyuanDiT2DModel, **sizes, **text, in_channels=4, sample_size=8, activation_fn="gelu-approximate"
    )
    parts = {"text_encoder": bert(), "tokenizer": bert_tokenizer(), "text_encoder_2": t5(), "vae": vae()}
    parts |= {"tokenizer_2": t5_tokenizer(), "safety_checker": None, "feature_extractor": None}
    noise = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.02,
        "prediction_type": "v_prediction",
    }
    scheduler = diffusers.DDPMScheduler(**noise, steps_offset=1, clip_sample=False)
    parts |= {"transformer": transformer, "scheduler": scheduler, "requires_safety_checker": False}
    return assemble(diffusers.HunyuanDiTPipeline, **parts)


def families() -> list[Family]:
    """Every family of this file."""
    short = {"max_sequence_length": 32}
    true = {"guidance": "true_cfg_scale"} | short
    plain = {"use_resolution_binning": False, "clean_caption": False} | short
    brief = plain | {"complex_human_instruction": None}
    return [
        Family("sd3", partial(sd3, diffusers.StableDiffusion3Pipeline), asking(**short)),
        Family(
            "sd3_controlnet",
            partial(sd3, diffusers.StableDiffusion3ControlNetPipeline, control=True),
            editing(image="control_image", **short),
            stray_noise=True,
        ),
        Family("flux", partial(flux, diffusers.FluxPipeline), asking(**true)),
        Family(
            "flux_kontext",
            partial(flux, diffusers.FluxKontextPipeline),
            editing(**true, max_area=256, _auto_resize=False),
        ),
        Family("flux_img2img", partial(flux, diffusers.FluxImg2ImgPipeline), editing(**true, strength=0.75)),
        Family("chroma", chroma, asking(**short)),
        Family("pixart_sigma", partial(pixart, diffusers.PixArtSigmaPipeline), asking(**plain)),
        Family("pixart_alpha", partial(pixart, diffusers.PixArtAlphaPipeline), asking(**plain)),
        Family("sana", partial(sana, diffusers.SanaPipeline, sana_solver), asking(32, **brief)),
        Family("sana_flow", partial(sana, diffusers.SanaPipeline, flow), asking(32, **brief)),
        Family(
            "sana_sprint",
            partial(sana, diffusers.SanaSprintPipeline, diffusers.SCMScheduler, guidance_embeds=True),
            asking(32, **brief, negative=False, intermediate_timesteps=None),
        ),
        Family("cogview4", cogview4, asking(**short)),
        Family("qwen_image", partial(qwen, diffusers.QwenImagePipeline, 2), asking(guidance="true_cfg_scale")),
        Family(
            "qwen_image_edit",
            partial(qwen, diffusers.QwenImageEditPipeline, 5, processor=qwen_processor),
            editing(64, guidance="true_cfg_scale", width=128),
        ),
        Family("aura_flow", aura_flow, asking(**short)),
        Family("lumina2", lumina2, asking(32, system_prompt="draw", **short)),
        Family("z_image", z_image, asking(max_sequence_length=64)),
        Family("hunyuan_dit", hunyuan_dit, asking(use_resolution_binning=False)),
    ]
