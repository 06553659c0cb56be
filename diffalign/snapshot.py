"""What a pipeline looks like from outside: enough to tell whether a call left a trace."""

from __future__ import annotations

from typing import Any

import torch

Snapshot = dict[str, Any]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(pipe: Any) -> Snapshot:
    """Identities and flags of a pipeline, its scheduler and modules; weights compare by identity and version."""
    seen: Snapshot = {
        "class": type(pipe),
        **{f"pipe.{k}": _mark(v) for k, v in vars(pipe).items() if not k.startswith("_")},
    }
    seen["scheduler.step"] = "step" in vars(pipe.scheduler)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            seen |= {f"{name}.{k}": v for k, v in _module(module).items()}
    return seen


def _module(module: torch.nn.Module) -> Snapshot:
    seen: Snapshot = {}
    for path, part in module.named_modules():
        seen[f"{path}.state"] = (
            id(part),
            part.training,
            "forward" in vars(part),
            *(len(getattr(part, h)) for h in _HOOKS),
        )
    for path, weight in module.named_parameters():
        seen[path] = (id(weight), weight.requires_grad, weight.dtype, weight._version, weight.grad is None)
    for path, buffer in module.named_buffers():
        seen[path] = (buffer.dtype, tuple(buffer.shape))
    return seen


def _mark(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else id(value)


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Names whose entry is new, gone or changed."""
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
