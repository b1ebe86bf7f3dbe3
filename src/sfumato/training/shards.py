"""Data sets as safetensors shards, read through the memory map: pictures, latents, embeddings, captions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.core import InputError

DTYPES = {
    "U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "BOOL": np.bool_,
    "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
TEXTS = "sfumato.texts"


class Dataset(Protocol):
    """What batches are made of."""

    def __len__(self) -> int: ...

    def batch(self, indices: Iterable[int]) -> Mapping[str, Any]:
        """The items together: tensors (B, *) and lists of B strings, by field."""
        ...


class Arrays:
    """A data set in memory: tensors, arrays (also ``np.load(..., mmap_mode='r')``) and lists of one length, by field."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        lengths = {name: len(value) for name, value in fields.items()}
        if not lengths or len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise InputError(f"the fields of a data set have one length, at least 1, not {lengths}")
        self.fields, self._length = dict(fields), next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items, by field."""
        indices = list(indices)
        return {name: _rows(value, indices) for name, value in self.fields.items()}


class Shards:
    """A folder of shards that :func:`write_shards` finished. ``card`` is what the writer said about it.

    Nothing is read into memory but the rows asked for. Raises InputError for a folder that is no finished data set, and
    for shards that are cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / "index.json"
        if not index.is_file():
            raise InputError(
                f"{path} is not a finished data set (no index.json): run what writes it again, it continues"
            )
        described = json.loads(index.read_text("utf-8"))
        self.counts: list[int] = described["counts"]
        self.card: dict[str, Any] = described["card"]
        self._starts = np.cumsum([0, *self.counts])
        self._open: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items, by field."""
        rows = np.fromiter(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise InputError(f"items {rows.min()} .. {rows.max()} of a data set of {len(self)}")
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        out: dict[str, Any] = {}
        for s in np.unique(shard).tolist():
            places = np.flatnonzero(shard == s)
            inside = (rows[places] - self._starts[s]).tolist()
            for name, value in self._shard(s).items():
                _put(out, name, _rows(value, inside), places, len(rows))
        return out

    def _shard(self, number: int) -> dict[str, Any]:
        if number not in self._open:
            self._open[number] = mapped(_shard_path(self.path, number))
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # memory maps are opened anew in another process


def write_shards(
    dataset: Dataset,
    path: str | Path,
    *,
    transform: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    per_shard: int = 4096,
    batch: int = 64,
    card: Mapping[str, Any] | None = None,
) -> Shards:
    """Write a data set as shards and open it; a run that was cut off continues after its last whole shard.

    transform   batch -> batch: encode pictures to latents ({"x": mean, "std": std} in float16), captions to embeddings, ...
    card        JSON-able description; a continued run must have the same card, so unlike data never mix

    Each shard is written to a temporary name and renamed. Raises InputError where the folder holds something else.
    """
    path, described = Path(path), dict(card or {})
    if (path / "index.json").is_file():
        done = Shards(path)
        if done.card != described or len(done) != len(dataset):
            raise InputError(
                f"{path} holds another data set ({len(done)} items, card {done.card}): choose another folder"
            )
        return done
    path.mkdir(parents=True, exist_ok=True)
    _same_plan(path, {"items": len(dataset), "per_shard": per_shard, "card": described})
    counts = []
    for number, start in enumerate(range(0, len(dataset), per_shard)):
        stop = min(start + per_shard, len(dataset))
        counts.append(stop - start)
        if not _shard_path(path, number).is_file():
            parts = []
            for lo in range(start, stop, batch):
                part = dataset.batch(range(lo, min(lo + batch, stop)))
                parts.append(part if transform is None else transform(part))
            _write(_shard_path(path, number), parts, stop - start)
    _replace(path / "index.json", json.dumps({"counts": counts, "card": described}, indent=1))
    (path / "plan.json").unlink()
    return Shards(path)


def mapped(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file as memory maps, and its lists of texts. Raises InputError for a damaged file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= 100_000_000:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
        texts = json.loads(header.pop("__metadata__", {}).get(TEXTS, "{}"))
        out: dict[str, Any] = dict(texts)
        for name, entry in header.items():
            start = 8 + size + entry["data_offsets"][0]
            out[name] = np.memmap(path, DTYPES[entry["dtype"]], "r", start, tuple(entry["shape"]))
        return out
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a whole shard ({type(error).__name__}: {error}): remove it and write it again"
        ) from error


def _write(path: Path, parts: Sequence[Mapping[str, Any]], n: int) -> None:
    tensors: dict[str, Tensor] = {}
    texts: dict[str, list[str]] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        length = sum(len(v) for v in values)
        if length != n:
            raise InputError(f"field {name!r} has {length} entries for {n} items")
        if isinstance(values[0], Tensor):
            tensors[name] = torch.cat(values).contiguous().cpu()
        else:
            texts[name] = [str(text) for value in values for text in value]
    temporary = path.with_name(f".{path.name}.part")
    save_file(tensors, temporary, {TEXTS: json.dumps(texts)})
    os.replace(temporary, path)


def _same_plan(path: Path, plan: Mapping[str, Any]) -> None:
    file = path / "plan.json"
    if file.is_file() and json.loads(file.read_text("utf-8")) != json.loads(json.dumps(plan)):
        raise InputError(f"{path} holds the beginning of another data set: choose another folder, or empty it")
    _replace(file, json.dumps(plan))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _rows(value: Any, indices: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[indices]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value[indices]))
    return [value[i] for i in indices]


def _put(out: dict[str, Any], name: str, rows: Any, places: Any, n: int) -> None:
    """Write rows of one shard to their places in the batch."""
    if isinstance(rows, list):
        whole = out.setdefault(name, [None] * n)
        for place, row in zip(places.tolist(), rows, strict=True):
            whole[place] = row
    else:
        whole = out.setdefault(name, torch.empty((n, *rows.shape[1:]), dtype=rows.dtype))
        whole[torch.from_numpy(places)] = rows
