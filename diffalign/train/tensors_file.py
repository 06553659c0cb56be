"""Nested values with tensors in them as safetensors beside JSON: what comes back equals what went in, to the bit.

`pack` gives plain JSON and named tensors, `unpack` turns both back. Tuples stay tuples, keys keep their types, floats
are written so that they are read exactly, NaN and infinities included. Nothing is pickled, so reading runs no code.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import ModelError

MARK = "!"  # the key of an object that stands for something JSON has not
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """The value as JSON, and its tensors by the names that the JSON refers to."""
    tensors: dict[str, Tensor] = {}
    return _pack(value, "state", tensors, {}), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` was given; tensors as they are in `tensors`."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(MARK)
    if kind is None:
        return {key: unpack(item, tensors) for key, item in tree.items()}
    what = tree["is"]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in what)
    if kind == "dict":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in what}
    if kind == "float":
        return float(what)
    if kind == "dtype":
        return DTYPES[what]
    tensor = tensors[what]
    if kind == "array":
        return tensor.numpy()
    return torch.view_as_complex(tensor) if kind == "complex128" else tensor


def write(folder: Path, name: str, value: Any) -> list[Path]:
    """Write `name.json` and `name.safetensors` down to the disk; OSError where they cannot be."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tree, tensors = pack(value)
    text, binary = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        save_file(tensors, binary)
    except SafetensorError as e:
        raise _as_os_error(e, binary) from e
    text.write_text(json.dumps(tree, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    for path in (text, binary):
        sync(path)
    return [text, binary]


def read(folder: Path, name: str) -> Any:
    """What `write` wrote, its tensors on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return unpack(tree, load_file(folder / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as e:
        raise ModelError(
            f"cannot read '{folder / name}' (.json, .safetensors): {type(e).__name__}: {e}. Use an older checkpoint."
        ) from e


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pack(value: Any, where: str, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    if isinstance(value, Tensor):
        return _pack_tensor(value, where, tensors, known)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {MARK: "array", "is": _name(torch.from_numpy(np.array(value)), where, tensors, known)}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {MARK: "float", "is": repr(float(value))}
    if isinstance(value, torch.dtype):
        return {MARK: "dtype", "is": str(value)}
    if isinstance(value, Mapping):
        items = [(key, _pack(item, f"{where}.{key}", tensors, known)) for key, item in value.items()]
        if all(type(key) is str for key in value) and MARK not in value:
            return dict(items)
        return {MARK: "dict", "is": [[_pack(key, f"{where} (key)", tensors, known), item] for key, item in items]}
    if isinstance(value, list | tuple):
        packed = [_pack(item, f"{where}.{k}", tensors, known) for k, item in enumerate(value)]
        return {MARK: "tuple", "is": packed} if isinstance(value, tuple) else packed
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, arrays and plain values only.")


def _pack_tensor(value: Tensor, where: str, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    """One entry for a tensor that is met twice, so that tied weights come back tied."""
    if type(value).__name__ == "DTensor" or value.layout is not torch.strided:
        raise TypeError(f"{where} is sharded or sparse; gather it into a plain tensor first.")
    value = value.detach()
    own = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
    if own not in known:
        kept = value if value.dtype != torch.complex128 else torch.view_as_real(value.resolve_conj())
        known[own] = _name(kept.resolve_conj().resolve_neg(), where, tensors, known)
    return {MARK: "complex128" if value.dtype == torch.complex128 else "tensor", "is": known[own]}


def _name(value: Tensor, where: str, tensors: dict[str, Tensor], known: dict[Any, str]) -> str:
    name = where
    while name in tensors:  # keys such as 1 and "1"
        name += "'"
    plain = value.cpu().contiguous()
    storage = plain.untyped_storage()
    alone = storage.nbytes() == plain.nbytes and known.setdefault(storage.data_ptr(), name) == name
    tensors[name] = plain if alone else plain.clone()  # no two entries of a file may share memory
    return name


def _as_os_error(error: Exception, path: Path) -> OSError:
    """What the writer of safetensors says in words, by its number."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else str(error), str(path))
