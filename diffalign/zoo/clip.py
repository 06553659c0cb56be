"""`shapes-clip`: an open_clip model trained on rendered scenes and captions, a useful and imperfect judge.

Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021, arXiv 2103.00020).
Where we differ: part of every batch are hard negatives, captions that differ from a true one in one thing; unlike the
generator it sees every composition, as real judges know more than the models they judge; images pass through the
autoencoder or get noise, since generated images are what it will judge.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from diffalign.cases import Case
from diffalign.intervals import bootstrap
from diffalign.world.compose import OPPOSITE
from diffalign.world.grammar import PLACES, SIZES, Clauses, parse, say
from diffalign.world.rendering import render_many
from diffalign.world.scenes import COLOURS, SHAPES
from diffalign.zoo.accuracy import judged
from diffalign.zoo.fit import FitConfig, fit
from diffalign.zoo.sd3 import TRAITS, captioned, tokenise
from diffalign.zoo.shelf import load_from
from diffalign.zoo.words import LENGTH, tokenizer


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes, data and training of the judge."""

    width: int = 128
    layers: int = 4
    embed: int = 128
    images: int = 16384
    smallest: float = 5.5  # radius in pixels
    batch: int = 128
    noise: float = 0.06  # largest deviation of the pixel noise
    blur: float = 0.5  # share of the images that are blurred as an autoencoder would
    hard: int = 2  # wrong captions per image
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=1200, matrix_rate=1.5e-3, warmup=60, ema=0.995, weight_decay=0.05)
    )


DEFAULT = CLIPConfig()
FACTS = {
    "class": "open_clip CustomTextCLIP",
    "data": "16,384 rendered scenes of all compositions with captions; wrong captions that differ in one thing",
    "method": "contrastive pre-training with hard negative captions",
    "call": {},
}


def model_config(config: CLIPConfig) -> dict[str, Any]:
    """The model in open_clip's own schema."""
    tokens = tokenizer()
    tower = {"width": config.width, "layers": config.layers}
    return {
        "embed_dim": config.embed,
        "custom_text": True,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "head_width": 32, **tower},
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": len(tokens),
            "heads": config.width // 32,
            "pool_type": "eos",
            "eos_id": tokens.eos_token_id,
            "pad_id": tokens.pad_token_id,
            "hf_tokenizer_name": "shapes-clip",
            **tower,
        },
    }


def make(config: CLIPConfig, *, work: Path, seed: int, resume: bool) -> Path:
    """Train the judge and write it as an open_clip folder."""
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(seed)
    model = CustomTextCLIP(**{k: v for k, v in model_config(config).items() if k != "custom_text"})
    captions, scenes = captioned(config.images, config.smallest, seed + 2, TRAITS, 0.5, seen_only=False)
    images = torch.cat([render_many(scenes[i : i + 512]) for i in range(0, len(scenes), 512)])
    ids, clauses = tokenise(captions), [parse(caption) for caption in captions]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(images), (config.batch,), generator=generator)
        rng = random.Random(int(pick.sum()) + step)
        wrong = tokenise([say(spoil(clauses[int(i)] or Clauses(()), rng)) for i in pick for _ in range(config.hard)])
        return contrast(model, worn(images[pick], config, generator), ids[pick], wrong)

    fit(model, loss, config.fit, folder=work / "judge", seed=seed, resume=resume, title="shapes-clip")
    return _write(model, config, work / "model")


def contrast(model: Any, images: Tensor, ids: Tensor, wrong: Tensor) -> Tensor:
    """Symmetric cross-entropy; wrong captions are further columns of the image's row."""
    features = normalize(model.encode_image(images * 2 - 1).float(), dim=-1)
    texts = normalize(model.encode_text(torch.cat([ids, wrong])).float(), dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * features @ texts.T  # (B, B + hard B)
    same = (ids[:, None] == torch.cat([ids, wrong])[None]).all(-1)  # equal captions are no negatives
    truth = torch.arange(len(ids))
    same[truth, truth] = False
    logits = logits.masked_fill(same, -1e4)
    return (cross_entropy(logits, truth) + cross_entropy(logits[:, : len(ids)].T, truth)) / 2


def worn(images: Tensor, config: CLIPConfig, generator: torch.Generator) -> Tensor:
    """Images as a small autoencoder would leave them: some blurred, all a little noisy."""
    soft = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = torch.rand(len(images), 1, 1, 1, generator=generator) < config.blur
    level = config.noise * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = level * torch.randn(images.shape, generator=generator)
    return (torch.where(blurred, soft, images) + noise).clamp(0, 1)


def spoil(clauses: Clauses, rng: random.Random) -> Clauses:
    """The clauses with one thing changed: a trait of an object, a relation turned round, or an object left out."""
    wants = list(clauses.wants)
    k = rng.randrange(len(wants))
    want = wants[k]
    known = [name for name in ("size", "place") if getattr(want, name)]
    kinds = ["colour", "shape", "count", *known, *known]
    kinds += ["relation"] * 2 if clauses.relations else ["fewer"] if len(wants) > 1 else []
    choice = rng.choice(kinds)
    if choice == "fewer":
        return Clauses((*wants[:k], *wants[k + 1 :]))
    if choice == "relation":
        relations = (replace(clauses.relations[0], kind=OPPOSITE[clauses.relations[0].kind]), *clauses.relations[1:])
        return Clauses(clauses.wants, relations)
    if choice == "colour" and want.colour:
        wants[k] = replace(want, colour=rng.choice([c for c in COLOURS if c != want.colour]))
    elif choice == "size":
        wants[k] = replace(want, size=rng.choice([size for size in SIZES if size != want.size]))
    elif choice == "place":
        wants[k] = replace(want, place=rng.choice([place for place in PLACES if place != want.place]))
    elif choice == "count":
        wants[k] = replace(want, count=rng.choice([n for n in (1, 2, 3, 4) if n != want.count]))
    else:
        wants[k] = replace(want, shape=rng.choice([s for s in SHAPES if s != want.shape]))
    return Clauses(tuple(wants), clauses.relations)


def _write(model: Any, config: CLIPConfig, target: Path) -> Path:
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    half = [0.5, 0.5, 0.5]
    pixels = {
        "size": 64,
        "mode": "RGB",
        "mean": half,
        "std": half,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    text = json.dumps({"model_cfg": model_config(config), "preprocess_cfg": pixels}, indent=2)
    (target / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    tokenizer().save_pretrained(target)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, target / "open_clip_model.safetensors")
    return target


def measured(target: Path, *, seed: int, n: int) -> dict[str, Any]:
    """What the card says about accuracy: the judge's area under the curve."""
    found = measure_judge(target, seed=seed, n=n)
    return {"strict": found["strict"], "measured": {"auc_within_prompts": found}}


def measure_judge(target: Path, *, seed: int, n: int, per_prompt: int = 8) -> dict[str, Any]:
    """AUC against the verifier within prompts, on `n` images that shapes-sd3 makes; bootstrap 95 % interval."""
    model, _, tokens = load_from(target)
    aucs, images = [], 0
    for media, cases, truth in judged(seed=seed, n=n, per_prompt=per_prompt):
        images += per_prompt
        if truth.any() and not truth.all():
            aucs.append(auc(similarity(model, tokens, media, cases), truth))
    found = bootstrap(aucs, seed=seed)
    return {"strict": found.mean, "lo": found.lo, "hi": found.hi, "n": images, "prompts": len(aucs), "seed": seed}


@torch.no_grad()
def similarity(model: Any, tokens: Any, media: Tensor, cases: Sequence[Case]) -> Tensor:
    """Cosine (B,) of 64-pixel images with their own prompts."""
    features = normalize(model.encode_image(media * 2 - 1).float(), dim=-1)
    texts = normalize(model.encode_text(tokens([case.prompt for case in cases])).float(), dim=-1)
    return (features * texts).sum(-1)


def auc(scores: Tensor, truth: Tensor) -> float:
    """Chance that a right image scores above a wrong one; ties count half."""
    gap = scores[truth][:, None] - scores[~truth][None]
    return float((gap > 0).float().mean() + (gap == 0).float().mean() / 2)
