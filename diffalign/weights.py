"""Weights that others publish: fetched, read without running code, converted once to safetensors, fitted to modules."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError, HubError, ModelError, OutputError

SAFE, PICKLED = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")
_OFFLINE = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout")
_STARTS = (b"PK", b"\x80")  # what torch.save writes: a zip archive, or in old files a bare pickle


def fetch(repo: str, file: str, revision: str | None = None, *, instead: str = "") -> Path:
    """A file of a hub repository, from the local cache where it is there; HubError says what to give instead."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as e:
        raise hub_error(f"'{file}' of '{repo}'", e, instead) from e


def fetch_folder(repo: str, patterns: Iterable[str], revision: str | None = None, *, instead: str = "") -> Path:
    """The files of a hub repository that match `patterns`, as one folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as e:
        raise hub_error(f"'{repo}'", e, instead) from e


def hub_error(what: str, error: Exception, instead: str = "") -> HubError:
    """Why a download failed, in one line."""
    reason = f"{type(error).__name__}: {_first_line(error)}"
    if type(error).__name__ in _OFFLINE:
        reason = f"there is no network here, and it is not in the local cache ({reason})"
    return HubError(f"cannot fetch {what} from the hub: {reason}. {instead}".strip())


def find(place: str, file: str, revision: str | None = None, *, instead: str = "") -> Path:
    """A weight file by path, in a folder, or in the hub repository `owner/name`."""
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path, file, instead)
    require_hub_id(place, instead)
    return fetch(place, file, revision, instead=instead)


def require_hub_id(place: str, instead: str = "") -> None:
    """Refuse what is neither here nor `owner/name`, before the hub is asked for a local path."""
    if place.count("/") != 1 or place.startswith((".", "/", "~")) or place.endswith("/"):
        raise ConfigError(f"there is no '{place}' here, and it is not a hub id (owner/name). {instead}".strip())


def read(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of its `entry` where it nests one; a pickled one is converted once and kept."""
    if path.suffix in SAFE:
        return _read_safe(path)
    if path.suffix not in PICKLED:
        raise ModelError(f"'{path}' is no checkpoint we can read; we take {', '.join(SAFE + PICKLED)}.")
    kept = cache_folder() / "weights" / f"{digest(path)}{'-' + entry if entry else ''}.safetensors"
    with contextlib.suppress(ModelError, OSError):  # a damaged copy is made again
        if kept.is_file():
            return _read_safe(kept)
    _keep(_unpickled(path, entry), kept)
    return _read_safe(kept)


def fit(module: nn.Module, state: Mapping[str, Tensor], who: str, *, ignore: Iterable[str] = ()) -> None:
    """Load `state` into `module`; every name and shape must agree, but for names that start with one of `ignore`."""
    skipped = tuple(ignore)
    given = {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(skipped)}
    wrong = [
        f"'{k}' is {tuple(given[k].shape)}, not {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    missing = [f"'{k}' is missing" for k in wanted if k not in given]
    surplus = [f"'{k}' is unknown" for k in given if k not in wanted]
    if faults := wrong + missing + surplus:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ModelError(
            f"the weights of {who} do not fit: {'; '.join(faults[:3])}{more}. "
            "They are of another architecture or version."
        )
    module.load_state_dict(given, strict=False)


def renamed(state: Mapping[str, Tensor], rule: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The state under other names; a rule that gives None drops the entry."""
    named = ((rule(name), tensor) for name, tensor in state.items())
    return {name: tensor for name, tensor in named if name is not None}


def digest(path: Path) -> str:
    """The first 16 digits of the SHA-256 of a file, or of all weights and settings in a folder."""
    if path.is_file():
        told = path.stat()
        return _digest(path.resolve(), told.st_size, told.st_mtime_ns)
    # Components are often links into another folder; rglob would not look into those.
    every = (Path(place) / name for place, _, names in os.walk(path, followlinks=True) for name in names)
    files = sorted(p for p in every if p.suffix in (*SAFE, *PICKLED, ".json", ".txt", ".model"))
    together = "\n".join(f"{p.relative_to(path)} {digest(p)}" for p in files)
    return hashlib.sha256(together.encode()).hexdigest()[:16]


def digest_of_tensors(folder: Path) -> str:
    """The first 16 digits of the SHA-256 of all safetensors in a folder and the folders in it."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in SAFE)
    together = "\n".join(f"{path.relative_to(folder)} {digest(path)}" for path in files)
    return hashlib.sha256(together.encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Where converted weights lie: $DIFFALIGN_CACHE, or diffalign under the user's cache folder."""
    own = os.environ.get("DIFFALIGN_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own).expanduser() if own else Path(shared) / "diffalign"


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module as rewards use it: no gradient to the weights, no dropout."""
    return module.requires_grad_(False).eval().to(dtype)


def _in_folder(folder: Path, file: str, instead: str) -> Path:
    """`file`, its safetensors twin, or the only .safetensors there is."""
    for name in (str(Path(file).with_suffix(".safetensors")), file):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        others = f"{len(found)} .safetensors files, and none is it" if found else "no .safetensors file"
        raise ConfigError(f"the folder '{folder}' has no '{file}', but {others}. {instead}".strip())
    return found[0]


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _read_safe(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError(f"cannot read the weights '{path}': {_first_line(e)}. Fetch them again.") from e


def _unpickled(path: Path, entry: str | None) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if not start.startswith(_STARTS):
            raise ModelError(
                f"'{path}' is no checkpoint: it is empty, damaged or another kind of file. Fetch it again."
            )
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ModelError(
            f"'{path}' holds Python objects beside tensors, and reading those can run code, so it is not loaded. "
            "Ask its authors for a state dict, best as safetensors."
        ) from e
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as e:
        raise ModelError(f"cannot read the weights '{path}': {_first_line(e)}. Fetch them again.") from e
    if entry is not None and isinstance(found, Mapping) and entry in found:
        found = found[entry]
    inside: Mapping[Any, Any] = found if isinstance(found, Mapping) else {}
    tensors = {str(name): value for name, value in inside.items() if isinstance(value, Tensor)}
    if not tensors:
        has = f"; it has {', '.join(map(repr, list(inside)[:5]))}" if inside else ""
        where = f" under {entry!r}" if entry else ""
        raise ModelError(f"'{path}' holds no named tensors{where}, so it is no state dict{has}.")
    return tensors


def _keep(tensors: Mapping[str, Tensor], place: Path) -> None:
    """Written beside its place, then renamed: others may convert at once, and an interruption leaves nothing behind."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    aside = place.with_name(f".{place.stem}.{uuid.uuid4().hex}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, aside)
        aside.replace(place)
    except (OSError, SafetensorError) as e:
        raise OutputError(
            f"cannot keep converted weights in '{place.parent}': {_first_line(e)}. "
            "Set DIFFALIGN_CACHE to a folder that can be written."
        ) from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def read_settings(file: Path) -> dict[str, Any]:
    """A settings file of a model, such as config.json."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"cannot read the settings '{file}': {e}. Fetch them again.") from e
    if not isinstance(found, dict):
        raise ModelError(f"the settings '{file}' are a {type(found).__name__}, not a mapping. Fetch them again.")
    return found
