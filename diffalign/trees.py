"""Search trees on disk, and what a tree was grown for: another prompt or reward would mix two searches."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any

import numpy as np
from torch import Tensor

from diffalign import atomic, scoring
from diffalign.errors import ConfigError
from diffalign.search.forest import Tree
from diffalign.searching import Session

OPEN = ("value",)  # what may change from call to call
# What changes neither nodes nor rewards, or is in the seeds already.
NOT_ASKED = ("generator", "latents", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")


def save_tree(tree: Tree, path: str | os.PathLike[str]) -> None:
    """Write a search tree, to be grown on by a later call; an old file stays whole until the new one is."""
    from safetensors.torch import save

    state = {name: tensor.contiguous() for name, tensor in tree.state().items()}
    atomic.write_bytes(os.fspath(path), save(state, metadata={"origin": json.dumps(tree.origin)}))


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """A search tree that `save_tree` wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as stored:
            tree = Tree.restore({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
            tree.origin = json.loads((stored.metadata() or {}).get("origin", "{}"))
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise ConfigError(f"'{os.fspath(path)}' is not a search tree ({e}). Give a file that save_tree wrote.") from e
    return tree


def origin_of(session: Session) -> dict[str, str]:
    """What a call asks for, by name: model, stock arguments, reward and stochastic step."""
    given = dict(session.request.arguments)
    if isinstance(given.get("prompt"), str):
        given["prompt"] = [given["prompt"]]
    asked = {
        name: _plain(value) for name, value in sorted(given.items()) if name not in NOT_ASKED and value is not None
    }
    versions = [str(part.version) for part in scoring.leaves(session.reward)]
    reward = " ".join([session.reward.name, *versions])
    return asked | {
        "model": _model(session),
        "reward": reward,
        "kernel": f"{session.chain.kernel_name} {session.chain.noise_level:g}",
    }


def require_same_origin(tree: Tree, asked: dict[str, str]) -> None:
    """Refuse to grow a tree on for something else than it was begun for."""
    before = tree.origin
    held = sorted((before.keys() | asked.keys()) - set(OPEN))
    changed = [name for name in held if before.get(name) != asked.get(name)]
    if before and changed:
        name = changed[0]
        raise ConfigError(
            f"the tree was grown with {name} = {before.get(name, 'nothing')}, but this call has "
            f"{asked.get(name, 'nothing')}. Repeat the call that began it, or begin a new tree."
        )


def _model(session: Session) -> str:
    """Pipeline class, where its denoiser came from, and the adapters that are on."""
    driver = session.chain.driver
    denoiser = driver.modules.get(driver.denoiser or "")
    told = [session.pipe.stock_class.__name__, str(getattr(getattr(denoiser, "config", None), "_name_or_path", ""))]
    adapters = getattr(denoiser, "active_adapters", None)
    with contextlib.suppress(ValueError):  # diffusers has none until the first is loaded
        told += adapters() if callable(adapters) else []
    return " ".join(told)


def _plain(value: Any) -> str:
    """A value in short: as JSON where it can be, else a hash of its numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray) or hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()[:16]
    if isinstance(value, list | tuple) and any(hasattr(each, "tobytes") or isinstance(each, Tensor) for each in value):
        return " ".join(_plain(each) for each in value)
    return json.dumps(value, default=lambda other: type(other).__name__)
