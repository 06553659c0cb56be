"""Weights shared out over processes (FSDP2): each holds a part of every tensor and gathers a block when it runs.

Blocks are the entries of the denoiser's module lists. The pipeline goes on calling the same module. It is loaded whole
in every process first; its other networks stay whole. A sharded pipeline is not put back after the training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.train.ema import fill, whole
from diffalign.train.settings import TrainConfig


def asked() -> bool:
    """Whether the launcher was told to shard."""
    return _told("ACCELERATE_USE_FSDP")


def check(settings: TrainConfig) -> None:
    """Refuse what cannot work, before a process group exists."""
    if _told("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the launcher asks for DeepSpeed, whose engine owns the model's forward, backward and step, while a "
            "pipeline calls its denoiser itself. Use FSDP2, which shards the same things: accelerate launch "
            "--config_file configs/accelerate/fsdp2.yaml."
        )
    if not asked():
        return
    told = "the launcher asks for FSDP, "
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(f"{told}version 1, which wraps a model so that pipelines lose it. Use fsdp_version: 2.")
    if _told("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            f"{told}with weights kept on the CPU, which is not supported. Use fsdp_offload_params: false."
        )
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        raise ConfigError(
            f"{told}with weights that stay gathered after a forward, so that an evaluation would see old ones. Use "
            "fsdp_reshard_after_forward: true."
        )
    for name, on in (("precision=fp16", settings.precision == "fp16"), ("compile=true", settings.compile)):
        if on:
            raise ConfigError(f"{told}which does not go with {name} here. Leave it out; precision=bf16 is fine.")


def shard(denoisers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Keep only this process's part of the weights of every denoiser, in place."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in denoisers.values():
        for block in blocks(module):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # True: what is gathered would not see an update


def blocks(module: nn.Module) -> list[nn.Module]:
    """The entries of the outermost module lists that have weights."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [entry for entry in child if any(True for _ in entry.parameters())]
        else:
            found += blocks(child)
    return found


def gathered(state: Any) -> Any:
    """An optimiser's state with whole tensors; every process must ask."""
    if isinstance(state, Tensor):
        return whole(state)
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    return [gathered(value) for value in state] if isinstance(state, list) else state


@torch.no_grad()
def spread(optimizer: torch.optim.Optimizer) -> None:
    """Share out what a whole state left in an optimiser of sharded weights."""
    for parameter, own in optimizer.state.items():
        for key, value in own.items():
            if hasattr(parameter, "device_mesh") and isinstance(value, Tensor) and value.shape == parameter.shape:
                own[key] = torch.zeros_like(parameter)
                fill(own[key], value)


def _told(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
