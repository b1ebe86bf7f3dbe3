"""Work in several processes of this machine, with errors as if there were one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any


def launched(function: Callable[..., Any], processes: int, *args: Any) -> None:
    """Run ``function(*args)`` in that many processes.

    An error that is the user's (bad input, a full disk) comes back as InputError with its message; any other as
    RuntimeError with the worker's own traceback.
    """
    from torch.multiprocessing.spawn import ProcessRaisedException

    from sfumato.core.errors import InputError
    from sfumato.training import launch

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of processes it ends
    try:
        with _threads_shared(processes):
            launch(function, processes, *args)
    except ProcessRaisedException as error:
        last = list(re.finditer(r"^([\w.]+(?:Error|Diverged|Name|Extra|Dataset)): ", str(error), re.MULTILINE))
        if last and _of_user(last[-1][1]):
            raise InputError(str(error)[last[-1].end() :].strip()) from error
        raise RuntimeError(str(error)) from error


@contextlib.contextmanager
def _threads_shared(processes: int) -> Iterator[None]:
    """Processes that are started here divide the cores among them, unless OMP_NUM_THREADS says otherwise."""
    name = "OMP_NUM_THREADS"
    if processes == 1 or name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        yield
    finally:
        del os.environ[name]


def _of_user(name: str) -> bool:
    return name.startswith("sfumato.") or name in (
        "ValueError",
        "OSError",
        "FileNotFoundError",
        "PermissionError",
        "ImportError",
    )


def on_cpu() -> bool:
    """Whether processes meet on the CPU, which accelerate has to be told."""
    import torch

    return not torch.accelerator.is_available()
