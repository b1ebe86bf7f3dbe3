"""What is slow to make and always the same, kept in the cache folder: whole, or made again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.files import cache_folder, write_atomically

log = logging.getLogger("sfumato")
Made = TypeVar("Made")


def digest(facts: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, shortened, of facts and of named tensors: their names, dtypes, shapes and every bit."""
    found = hashlib.sha256()
    for fact in facts:
        found.update(fact.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def kept(what: str, name: str, make: Callable[[], bytes], read: Callable[[bytes], Made]) -> Made:
    """``read`` of the bytes that ``make`` made, now or at an earlier opening.

    what   is said in the log ('sfumato', level INFO), with where it lies
    name   of the file in ``$SFUMATO_CACHE``, else ``~/.cache/sfumato``; it says all that the bytes depend on

    The file begins with the checksum of the rest: one that is cut off or changed is made again, with a warning, and so is one
    that cannot be read. Where the folder cannot be written the result is used without being kept, with a warning.
    """
    path = cache_folder() / name
    try:
        held: bytes | None = path.read_bytes()
    except FileNotFoundError:
        held = None
    except OSError as error:
        held = None
        log.warning("%s cannot be read (%s)", path, error)
    if held is not None:
        if hashlib.sha256(held[32:]).digest() == held[:32]:
            log.info("%s: read from %s", what, path)
            return read(held[32:])
        log.warning("%s is damaged: it is made again", path)
    log.info("%s: made now, and kept in %s for the next time", what, path)
    data = make()
    try:
        write_atomically(path, hashlib.sha256(data).digest() + data)
    except OSError as error:
        log.warning("%s cannot be kept (%s): it is made again at the next opening", path, error)
    return read(data)


__all__ = ["digest", "kept"]
