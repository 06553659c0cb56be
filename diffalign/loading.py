"""Objects by address: `file.py:name`, `module:name`, and the entry points of installed packages."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.errors import ConfigError, DiffalignError, UnknownName

_warned: set[tuple[str, str, str]] = set()


def load_address(address: str) -> tuple[ModuleType, str]:
    """Import what `file.py:name` or `module:name` points to; returns the module and the name."""
    place, _, name = address.rpartition(":")
    if not place or not name:
        raise ConfigError(f"'{address}' is not an address. Write file.py:name or module:name.")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place, address)
    return module, name


def find_in(module: ModuleType, name: str, kind: str) -> Any:
    """The attribute `name` of a module, or UnknownName with the callables it has."""
    if hasattr(module, name):
        return getattr(module, name)
    known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
    where = getattr(module, "__file__", None) or module.__name__
    near = UnknownName.among(kind, name, known, f"python -c 'import {module.__name__}'")
    raise UnknownName(str(near).split(" Run `")[0] + f" (looked in {where})")


def plugins(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name; the first distribution to claim a name keeps it."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, point)
    return found


def load_plugin(point: EntryPoint) -> Any:
    """The object behind an entry point; whatever goes wrong inside it becomes one error that names the distribution."""
    try:
        return point.load()
    except DiffalignError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(
            f"the plug-in '{point.name}' of the package '{owner(point)}' does not load ({point.value}): "
            f"{type(e).__name__}: {e}. Update or uninstall that package."
        ) from e


def try_plugin(point: EntryPoint) -> Any | None:
    """The object behind an entry point, or None and one warning."""
    try:
        return load_plugin(point)
    except DiffalignError as e:
        warn_once(point, str(e))
        return None


def warn_once(point: EntryPoint, message: str) -> None:
    """Say it once per plug-in and process."""
    key = (point.group, point.name, point.value)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=3)


def owner(point: EntryPoint) -> str:
    """The distribution an entry point belongs to."""
    return point.dist.name if point.dist else "unknown"


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"no file '{path}'. Write file.py:name with a path from the current folder, or an absolute one."
        )
    path = path.resolve()
    stamp = f"{path}:{path.stat().st_mtime_ns}:{path.stat().st_size}"
    name = f"_diffalign_file_{path.stem}_{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up by name
    try:
        with _on_path(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        if isinstance(e, DiffalignError):
            raise
        raise ConfigError(
            f"'{path}' does not load: {type(e).__name__}: {e}. It must run by itself as a Python file."
        ) from e
    return module


def _load_module(name: str, address: str) -> ModuleType:
    try:
        with _on_path(Path.cwd()):
            return importlib.import_module(name)
    except DiffalignError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(
            f"cannot import '{name}' for '{address}': {type(e).__name__}: {e}. "
            "Write file.py:name or module:name with a module Python can import from here."
        ) from e


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Neighbours of a user's file can be imported while it loads."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
