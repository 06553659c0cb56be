"""Families around a UNet: Stable Diffusion with its schedulers, SDXL, and their editing and control variants."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel

from .family import Family, asking, assemble, editing, loud, pictures, vae
from .text import WIDTH, clip, clip_tokenizer

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}
XL_TIME = 8


def scheduler(key: str) -> Any:
    """A noise scheduler with Stable Diffusion's betas."""
    cls, extra = SCHEDULERS[key]
    return cls(**NOISE, **extra)


def blocks(width: int) -> dict[str, Any]:
    """Sizes that a UNet and its ControlNet have to share."""
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
    return sizes | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": width}


def unet(width: int = WIDTH, **extra: Any) -> UNet2DConditionModel:
    """A two-level UNet that reads text of that width."""
    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    return loud(UNet2DConditionModel, **blocks(width) | {"up_block_types": up, "sample_size": 8} | extra)


def controlnet() -> ControlNetModel:
    """A ControlNet whose hint encoder halves the picture once, as the autoencoder does."""
    return loud(ControlNetModel, **blocks(WIDTH), conditioning_embedding_out_channels=(4, 4))


def stable(cls: type[DiffusionPipeline], sampler: str = "ddim", **extra: Any) -> DiffusionPipeline:
    """A Stable Diffusion pipeline of that class; `extra` names further components and how to make them."""
    parts = {"vae": vae(), "text_encoder": clip(), "tokenizer": clip_tokenizer(), "scheduler": scheduler(sampler)}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return assemble(cls, **parts | {name: make() for name, make in extra.items()})


def sdxl(cls: type[DiffusionPipeline], **extra: Any) -> DiffusionPipeline:
    """An SDXL pipeline of that class, with its two text encoders and its size embeddings."""
    text = {"text_encoder": clip(), "tokenizer": clip_tokenizer()}
    text |= {"text_encoder_2": clip(projection=True), "tokenizer_2": clip_tokenizer()}
    time = {"addition_embed_type": "text_time", "addition_time_embed_dim": XL_TIME}
    time |= {"projection_class_embeddings_input_dim": 6 * XL_TIME + WIDTH}
    parts = {"vae": vae(), "unet": unet(2 * WIDTH, **time | extra), "scheduler": scheduler("euler")}
    return assemble(cls, **text, **parts)


def masking(batch: int) -> dict[str, Any]:
    """An inpainting call that repaints the left half of every picture."""
    masks = [picture.convert("L").point(lambda _: 0) for picture in pictures(batch)]
    for mask in masks:
        mask.paste(255, (0, 0, 8, 16))
    return editing()(batch) | {"mask_image": masks}


def families() -> list[Family]:
    """Every family of this file."""
    sd, xl = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline
    variants = [Family(f"sd15_{key}", partial(stable, sd, key, unet=unet), asking()) for key in SCHEDULERS]
    return [
        Family("sd15", partial(stable, sd, unet=unet), asking()),
        Family("sd15_ddim_eta1", partial(stable, sd, unet=unet), asking(eta=1.0)),
        *variants,
        Family("sdxl", partial(sdxl, xl), asking()),
        Family("sdxl_denoising_end", partial(sdxl, xl), asking(denoising_end=0.6)),
        Family("sdxl_inpaint", partial(sdxl, diffusers.StableDiffusionXLInpaintPipeline), masking),
        Family(
            "sdxl_instruct_pix2pix",
            partial(sdxl, diffusers.StableDiffusionXLInstructPix2PixPipeline, in_channels=8),
            editing(),
        ),
        Family(
            "instruct_pix2pix",
            partial(
                stable, diffusers.StableDiffusionInstructPix2PixPipeline, "euler", unet=partial(unet, in_channels=8)
            ),
            editing(),
        ),
        Family(
            "sd_controlnet",
            partial(stable, diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=controlnet),
            editing(),
        ),
        Family("sdxl_img2img", partial(sdxl, diffusers.StableDiffusionXLImg2ImgPipeline), editing(strength=0.9)),
        Family("sd_img2img", partial(stable, diffusers.StableDiffusionImg2ImgPipeline, unet=unet), editing()),
        Family("sd_inpaint", partial(stable, diffusers.StableDiffusionInpaintPipeline, unet=unet), masking),
        Family(
            "latent_consistency",
            partial(stable, diffusers.LatentConsistencyModelPipeline, "lcm", unet=partial(unet, time_cond_proj_dim=8)),
            asking(negative=False),
        ),
        Family("sd_pag", partial(stable, diffusers.StableDiffusionPAGPipeline, unet=unet), asking()),
    ]
