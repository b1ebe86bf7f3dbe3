"""One safetensors file a checkpoint: any tree of tensors and JSON values, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.core import InputError, SfumatoError

KEY = "sfumato.tree"


class CheckpointError(SfumatoError, OSError):
    """A checkpoint could not be written; the one before it is intact."""


def write(path: Path, tree: Any) -> None:
    """Save a tree of dicts, lists, tensors and JSON values under ``path``.

    The bytes go to a temporary name in the same folder, are synced to the disk and then renamed, so ``path`` always holds
    a whole checkpoint, whatever moment the process dies at. Raises CheckpointError (disk full, no permission) and leaves
    what was there.
    """
    skeleton, tensors = flatten(tree)
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {KEY: json.dumps(skeleton)})
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        kept = "the checkpoint before it is intact" if path.exists() else "there is none before it"
        raise CheckpointError(
            f"{path} could not be written ({error}); {kept}: free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read(path: Path) -> Any:
    """The tree saved under ``path``, tensors on the CPU. Raises InputError for a truncated or foreign file."""
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            skeleton = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return unflatten(skeleton, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {error}): it is truncated or something else; "
            "put a copy in its place, or remove it to start anew"
        ) from error


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON skeleton, tensors by path). A tensor that occurs twice (tied weights) is stored once."""
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}
    storages: set[int] = set()

    def leaf(value: Tensor, path: str) -> dict[str, str]:
        value = value.detach()
        storage = value.untyped_storage().data_ptr()
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in seen:
            return {"tensor": seen[place]}
        while path in tensors:  # {"a": {"b": ...}, "a/b": ...}
            path += "'"
        seen[place] = path
        shared = storage in storages
        storages.add(storage)
        tensors[path] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
        return {"tensor": path}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return leaf(value, path)
        if isinstance(value, Mapping):
            return {"dict": [[k, walk(v, f"{path}/{k}" if path else str(k))] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [walk(v, f"{path}/{i}") for i, v in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise InputError(
            f"{path} is a {type(value).__name__}: a checkpoint holds tensors, dicts, lists and JSON values only"
        )

    return walk(tree, ""), tensors


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten` (tuples come back as lists)."""
    if "tensor" in skeleton:
        return tensors[skeleton["tensor"]]
    if "dict" in skeleton:
        return {k: unflatten(v, tensors) for k, v in skeleton["dict"]}
    if "list" in skeleton:
        return [unflatten(v, tensors) for v in skeleton["list"]]
    return skeleton["value"]


def fit_shapes(what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError unless two state dicts have the same names and shapes."""
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or extra:
        raise InputError(
            f"{what} does not fit: it lacks {missing[:4] or 'nothing'} and has {extra[:4] or 'nothing'} too many; "
            "build the network as it was when the checkpoint was made"
        )
    for name, value in wanted.items():
        if isinstance(value, Tensor) and value.shape != given[name].shape:
            raise InputError(
                f"{what} does not fit: {name} is {tuple(given[name].shape)} there and {tuple(value.shape)} here; "
                "build the network as it was when the checkpoint was made"
            )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
