"""What a training on a processor does to the machine it runs on."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import device, nn

from sfumato.networks.products import fast_products

log = logging.getLogger("sfumato")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving it back to the system; True where that could be set.

    A training step frees and asks for the same large tensors again and again. By default glibc returns them each time,
    and the kernel clears every page anew: about a tenth of a step of a small network. The setting lasts as long as the
    process. Elsewhere (no glibc) nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    log.debug("freed memory is kept: %s", done)
    return done


@contextmanager
def fast(network: nn.Module, where: device) -> Iterator[None]:
    """Freed memory is kept, and linear layers run in the faster of torch's two kernels: on a CPU, nothing elsewhere."""
    if where.type != "cpu":
        yield
        return
    keep_freed_memory()
    with fast_products(network):
        yield
