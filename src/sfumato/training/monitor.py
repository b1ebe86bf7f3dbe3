"""What a training shows: metrics.jsonl, a progress bar, and signals that wait for the iteration to end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from sfumato.core import MissingExtra

log = logging.getLogger("sfumato")


class Metrics:
    """``metrics.jsonl``: one JSON object a line. After a resume it is as if the training had never been interrupted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, it: int) -> None:
        """Drop what was logged after iteration ``it``, and a line that was cut short."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text("utf-8").splitlines() if _iteration(line) <= it]
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text("".join(line + "\n" for line in kept), "utf-8")
        os.replace(temporary, self.path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line, on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["it"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Progress:
    """A bar with images a second and the time left on a terminal; nothing anywhere else."""

    def __init__(self, total: int, done: int, show: bool | None) -> None:
        self._bar: Any = None
        if show if show is not None else sys.stderr.isatty():
            self._bar, self._task = _bar(total, done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, it: int) -> None:
        """Iteration ``it`` is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=it)

    def figures(self, loss: float, rate: float) -> None:
        """Show the latest loss and images a second."""
        if self._bar is not None:
            self._bar.update(self._task, figures=f"loss {loss:.4f}  {rate:.1f} images/s")


def _bar(total: int, done: int) -> tuple[Any, Any]:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        raise MissingExtra("rich", extra="train") from None
    columns = [progress.TextColumn("{task.completed}/{task.total}"), progress.BarColumn()]
    columns += [progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[figures]}")]
    bar = progress.Progress(*columns, console=Console(stderr=True))
    return bar, bar.add_task("training", total=total, completed=done, figures="")


class Interruption:
    """Holds SIGINT and SIGTERM back until the iteration is done; the second one is not held back.

    Only the main thread receives signals: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._hold) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def deliver(self) -> None:
        """Let the signal that waited do what it would have done."""
        self._restore()
        if self.pending:
            signal.raise_signal(self.pending)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            self.deliver()
        self.pending = number
        log.warning("stopping after this iteration with a checkpoint; interrupt again to stop at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
