"""Video families: CogVideoX, LTX, Wan and HunyuanVideo, from text or from a first frame."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torchvision.transforms.functional import pil_to_tensor

from .family import Family, asking, assemble, editing, loud, pictures, seeded
from .text import WIDTH, clip, clip_tokenizer, llama, llama_tokenizer, t5, t5_tokenizer, umt5

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
FRAMES = 5
SHORT = {"num_frames": FRAMES, "max_sequence_length": 32}


def cogvideox(rotary: bool) -> DiffusionPipeline:
    """A CogVideoX pipeline: the small checkpoint samples with DDIM, the large one with DPM and rotary positions."""
    levels = {"block_out_channels": (8,) * 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    levels |= {"down_block_types": ("CogVideoXDownBlock3D",) * 3, "up_block_types": ("CogVideoXUpBlock3D",) * 3}
    grid = {"sample_width": 4, "sample_height": 4, "sample_frames": 9, "max_text_seq_length": 32}
    transformer = loud(
        diffusers.CogVideoXTransformer3DModel,
        **HEADS,
        **grid,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        use_rotary_positional_embeddings=rotary,
    )
    sampler = diffusers.CogVideoXDPMScheduler if rotary else diffusers.CogVideoXDDIMScheduler
    scheduler = sampler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    parts = {
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
        "vae": seeded(diffusers.AutoencoderKLCogVideoX, **levels),
    }
    return assemble(diffusers.CogVideoXPipeline, **parts, transformer=transformer, scheduler=scheduler)


def ltx_vae() -> diffusers.AutoencoderKLLTXVideo:
    """LTX's autoencoder with one level of scaling: latents eight times smaller, frames halved."""
    widths = {"block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 8}
    depths = {"layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
    scaling = {"spatio_temporal_scaling": (True, False), "decoder_spatio_temporal_scaling": (True, False)}
    scaling |= {"down_block_types": ("LTXVideoDownBlock3D",) * 2, "downsample_type": ("conv",) * 2}
    scaling |= {"decoder_inject_noise": (False,) * 3, "upsample_residual": (False,) * 2, "upsample_factor": (1, 1)}
    return loud(diffusers.AutoencoderKLLTXVideo, gain=1.4, **widths, **depths, **scaling)


def ltx(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """An LTX pipeline, whose latents travel as a sequence of tokens."""
    sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 32}
    transformer = loud(diffusers.LTXVideoTransformer3DModel, **HEADS, **sizes)
    parts = {"text_encoder": t5(), "tokenizer": t5_tokenizer(), "vae": ltx_vae(), "transformer": transformer}
    return assemble(cls, **parts, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def wan_vae() -> diffusers.AutoencoderKLWan:
    """Wan's autoencoder: latents eight times smaller, frames four times fewer after the first."""
    moments = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return loud(diffusers.AutoencoderKLWan, gain=1.4, **sizes, **moments)


def wan_transformer(in_channels: int = 4) -> diffusers.WanTransformer3DModel:
    """Wan's denoiser; from a first frame it also reads that frame's latents and a mask."""
    sizes = HEADS | {"attention_head_dim": 12, "in_channels": in_channels, "out_channels": 4}
    return loud(diffusers.WanTransformer3DModel, **sizes, text_dim=32, freq_dim=16, ffn_dim=32)


def wan(cls: type[DiffusionPipeline], in_channels: int = 4, experts: int = 1, **extra: Any) -> DiffusionPipeline:
    """A Wan pipeline; with two experts, one denoises the noisy steps and the other the rest."""
    flows = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    parts = {"text_encoder": umt5(), "tokenizer": t5_tokenizer(), "vae": wan_vae()}
    parts |= {"transformer": wan_transformer(in_channels), "scheduler": diffusers.UniPCMultistepScheduler(**flows)}
    if experts == 2:
        parts |= {"transformer_2": wan_transformer(in_channels), "boundary_ratio": 0.875}
        parts["transformer_2"].proj_out.weight.data.neg_()  # the experts must not be twins
    return assemble(cls, **parts, **extra)


def hunyuan_video() -> DiffusionPipeline:
    """A HunyuanVideo pipeline with distilled guidance beside true guidance."""
    levels = {"block_out_channels": (8,) * 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    levels |= {"down_block_types": ("HunyuanVideoDownBlock3D",) * 3, "up_block_types": ("HunyuanVideoUpBlock3D",) * 3}
    vae = seeded(diffusers.AutoencoderKLHunyuanVideo, **levels, spatial_compression_ratio=4)
    sizes = {"in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2}
    text = {"text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "rope_axes_dim": (4, 6, 6)}
    transformer = loud(diffusers.HunyuanVideoTransformer3DModel, **HEADS, **sizes, **text)
    parts = {"text_encoder": llama(), "tokenizer": llama_tokenizer(), "text_encoder_2": clip(), "vae": vae}
    parts |= {"tokenizer_2": clip_tokenizer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}
    return assemble(diffusers.HunyuanVideoPipeline, **parts, transformer=transformer)


def first_frames(batch: int) -> dict[str, Any]:
    """A Wan call from first frames: it takes one picture or a tensor of them, never a list."""
    frames = torch.stack([pil_to_tensor(picture) / 255 for picture in pictures(batch, 32)])
    return asking(32, **SHORT)(batch) | {"image": frames}


def families() -> list[Family]:
    """Every family of this file."""
    told = {"template": "describe {}", "crop_start": len(llama_tokenizer()("describe ").input_ids)}
    text, frame, longer = asking(32, **SHORT), editing(32, **SHORT), asking(**SHORT | {"num_frames": 9})
    film, i2v = partial(Family, video=True), diffusers.WanImageToVideoPipeline
    one_frame = "the stock call gives every prompt the same first frame"
    return [
        film("cogvideox", partial(cogvideox, rotary=False), longer),
        film("cogvideox_dpm", partial(cogvideox, rotary=True), longer),
        film("ltx_video", partial(ltx, diffusers.LTXPipeline), text),
        film("ltx_image2video", partial(ltx, diffusers.LTXImageToVideoPipeline), frame),
        film("wan21", partial(wan, diffusers.WanPipeline), text),
        film("wan22", partial(wan, diffusers.WanPipeline, experts=2), asking(32, **SHORT, guidance_scale_2=2.0)),
        film("wan22_ti2v", partial(wan, diffusers.WanPipeline, expand_timesteps=True), text),
        film("wan_image2video", partial(wan, i2v, in_channels=12), first_frames, batch=False, reason=one_frame),
        film("wan22_ti2v_image", partial(wan, i2v, expand_timesteps=True), first_frames, batch=False, reason=one_frame),
        film(
            "hunyuan_video",
            hunyuan_video,
            asking(guidance="true_cfg_scale", prompt_template=told, **SHORT),
        ),
    ]
