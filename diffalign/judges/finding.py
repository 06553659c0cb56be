"""`find_judge`: from a name, folder or address to a backend."""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from diffalign import registry
from diffalign.errors import ConfigError
from diffalign.judges.asking import Backend
from diffalign.judges.secrets import without_secrets

EMBEDDED = "shapes-vlm"
KINDS = (
    f"Give '{EMBEDDED}', the folder or hub id of an image-text-to-text model, the address of a server "
    "(http://127.0.0.1:8000/v1#model), a mapping with `model` or `url`, or a backend."
)
_shared: WeakValueDictionary[str, Any] = WeakValueDictionary()
_lock = threading.Lock()


def find_judge(spec: str | Mapping[str, Any] | Backend = EMBEDDED) -> Backend:
    """A backend as it is, else the one that a name, address or mapping with settings stands for.

    Equal specs share one judge for as long as anything uses it, so that a model is loaded once for all rewards.
    """
    if isinstance(spec, str):
        settings = _named(spec)
    elif isinstance(spec, Mapping):
        settings = dict(spec)
    elif not isinstance(spec, type) and all(callable(getattr(spec, name, None)) for name in ("reply", "decide")):
        return spec
    else:
        raise ConfigError(f"judge is {spec!r} (a {type(spec).__name__}), which cannot be asked. {KINDS}")
    kind = _kind(settings)
    _check(kind, settings)
    if settings.get("model") == EMBEDDED and "url" not in settings:
        settings = _embedded(settings)
    key = f"{kind} {json.dumps(settings, sort_keys=True, default=repr)} {_stamp(settings)}"
    with _lock:
        found = _shared.get(key)
        if found is None:
            found = _shared[key] = _class(kind)(**settings)
    made: Backend = found
    return made


def own_judge(**settings: Any) -> Any:
    """A local judge that nobody else uses, so that its weights may be changed."""
    _check("local", settings)
    return _class("local")(**(_embedded(settings) if settings.get("model") == EMBEDDED else settings))


def _named(spec: str) -> dict[str, Any]:
    spec = spec.strip()
    if not spec:
        raise ConfigError(f"judge is empty. {KINDS}")
    if re.match(r"[\w.-]+:\d+(/|#|$)", spec):
        raise ConfigError(f"judge is '{spec}', an address without its scheme. Write http://{spec}.")
    if spec.lower().startswith(("http://", "https://")):
        url, _, model = spec.partition("#")
        return {"url": url} | ({"model": model} if model else {})
    return {"model": spec}


def _kind(settings: Mapping[str, Any]) -> str:
    if "url" in settings:
        return "endpoint"
    model = settings.get("model")
    if not isinstance(model, str | Path) or not str(model).strip():
        raise ConfigError(f"judge is {without_secrets(settings)!r}, which names neither a model nor a server. {KINDS}")
    return "local"


def _class(kind: str) -> Any:
    if kind == "local":
        from diffalign.judges.local import LocalJudge

        return LocalJudge
    from diffalign.judges.endpoint import EndpointJudge

    return EndpointJudge


def _check(kind: str, settings: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(_class(kind).__init__).parameters if name != "self"]
    if unknown := [name for name in settings if name not in known]:
        raise ConfigError(
            f"judge has the setting '{unknown[0]}', which a judge {_where(kind)} does not know. "
            f"It knows {', '.join(known)}."
        )


def _where(kind: str) -> str:
    return "in this process (`model`)" if kind == "local" else "on a server (`url`)"


def _embedded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The folder that ships with the package, and the settings that its card asks for unless others are given."""
    folder = registry.embedded(EMBEDDED)
    card = folder / "card.json"
    told = json.loads(card.read_text(encoding="utf-8")).get("judge", {}) if card.is_file() else {}
    return {**told, **settings, "model": str(folder)}


def _stamp(settings: Mapping[str, Any]) -> list[Any]:
    """What changes with the files of a local model: another model at the same path is another judge."""
    names = [] if "url" in settings else [settings.get("model"), settings.get("adapter")]
    folders = [folder for name in names if name and (folder := Path(str(name)).expanduser()).is_dir()]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
