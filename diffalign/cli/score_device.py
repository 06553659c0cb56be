"""The device of `diffalign score`: checked before any image is read."""

from __future__ import annotations

from diffalign.cli.model import ModelVerb
from diffalign.errors import ConfigError


def require_device(name: str) -> str:
    """The device called `name`, `auto` as in `generate`; ConfigError where nothing can be computed on it."""
    import torch

    device, _ = ModelVerb(device=name).place()
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        here = _here()
        raise ConfigError(
            f"device is '{name}', which does not work here; there is {', '.join(here)}. Give --device {here[-1]}, or "
            "auto for the fastest."
        ) from e
    return device


def _here() -> list[str]:
    """Every device that torch can use."""
    import torch

    cuda = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *(["mps"] if torch.backends.mps.is_available() else []), *cuda]
