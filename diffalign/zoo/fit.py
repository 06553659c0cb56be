"""The training loop of every recipe: Muon or AdamW, warm-up and cosine, EMA, resumable checkpoints without pickles.

Step k draws everything random from a generator seeded by (seed, k), so an interrupted run ends at the same weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

Loss = Callable[[int, torch.Generator], Tensor]  # (step, generator) -> scalar


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how fast to train."""

    steps: int
    learning_rate: float = 1e-3
    matrix_rate: float = 0.0  # rate of Muon for the matrices inside transformer blocks; 0 leaves them to AdamW
    warmup: int = 100  # steps of linear warm-up
    floor: float = 0.02  # the cosine ends at this share of the learning rate
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # share of the average kept each step; 0 keeps the raw weights
    save_every: int = 250  # steps between checkpoints
    bf16: bool = True  # autocast of the forward pass


def fit(
    model: nn.Module, loss: Loss, config: FitConfig, *, folder: Path, seed: int, resume: bool, title: str
) -> nn.Module:
    """Train `model` in place and return it with its averaged weights."""
    keep_freed_memory()
    optimizers = _optimizers(model, config)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    file = folder / "state.safetensors"
    start = _restore(file, model, average, optimizers) if resume and file.exists() else 0
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc=title, mininterval=2.0)
    for step in bar:
        value = _step(model, loss, config, optimizers, step, seed)
        keep = min(config.ema, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - keep)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{value:.4f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(file, model, average, optimizers, step + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])
    return model.eval()


def _optimizers(model: nn.Module, config: FitConfig) -> list[torch.optim.Optimizer]:
    """AdamW, with Muon (Jordan et al., 2024) for the matrices of the blocks where a rate for them is set."""
    inner = ("transformer_blocks.", ".layers.", ".layer.", "resblocks.")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        inside = p.ndim == 2 and "norm" not in name and any(part in name for part in inner)
        (matrices if inside and config.matrix_rate else others).append(p)
    rate, decay = config.learning_rate, config.weight_decay
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=decay)]
    if matrices:
        decay *= rate / config.matrix_rate
        found.append(
            torch.optim.Muon(matrices, lr=config.matrix_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def _step(
    model: nn.Module, loss: Loss, config: FitConfig, optimizers: list[torch.optim.Optimizer], step: int, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    done = max(step - config.warmup, 0) / max(config.steps - config.warmup, 1)
    cosine = config.floor + (1 - config.floor) * (1 + math.cos(math.pi * done)) / 2
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * cosine * min(1.0, (step + 1) / max(config.warmup, 1))
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        value = loss(step, generator)
    model.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        optimizer.step()
    return float(value.detach())


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks: giving them back after every step costs up to ten times the step itself."""
    import ctypes
    import sys

    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _save(
    file: Path, model: nn.Module, average: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    from safetensors.torch import save_file

    state = {f"model.{k}": v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    state |= {f"average.{k}": v.contiguous() for k, v in average.items()}
    for name, p in model.named_parameters():
        for key, value in _owner(p, optimizers).state.get(p, {}).items():
            state[f"optimizer.{key}.{name}"] = value.clone().contiguous()
    unfinished = file.with_suffix(".part")
    save_file(state, unfinished, metadata={"step": str(step)})
    os.replace(unfinished, file)


def _owner(p: nn.Parameter, optimizers: list[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer that updates a parameter."""
    return next(o for o in optimizers for group in o.param_groups if any(q is p for q in group["params"]))


def _restore(file: Path, model: nn.Module, average: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> int:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        step = int(stored.metadata()["step"])
        names = list(stored.keys())
        model.load_state_dict({n[6:]: stored.get_tensor(n) for n in names if n.startswith("model.")})
        for name, p in model.named_parameters():
            average[name] = stored.get_tensor(f"average.{name}")
            slots = [n.split(".", 2)[1] for n in names if n.startswith("optimizer.") and n.split(".", 2)[2] == name]
            if slots:
                _owner(p, optimizers).state[p] = {key: stored.get_tensor(f"optimizer.{key}.{name}") for key in slots}
    return step
