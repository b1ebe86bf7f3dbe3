"""The application: one way to answer, one way to fail."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

FAILED, MISUSED, DEFECT, INTERRUPTED = 1, 2, 3, 130
# Threads of the CPU that wait without spinning: beside other work on the machine a spinning one holds up all (40 x seen).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True)
class Answer:
    """What a command found: ``record`` for ``--json``, ``shown`` (text or a rich renderable) for people, the exit status."""

    record: Mapping[str, Any]
    shown: Any = None
    status: int = 0


class Commands(TyperGroup):
    """Commands whose failures are one line on stderr and an exit status; ``SFUMATO_DEBUG=1`` shows where they come from."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        sys.exit(self._status(args, *rest, **{**options, "standalone_mode": False}))

    def _status(self, *args: Any, **options: Any) -> int:
        try:
            with _terminable():
                status = super().main(*args, **options) or 0
            return _say("interrupted", status) if status == INTERRUPTED else status
        except KeyboardInterrupt:
            return _say("interrupted", INTERRUPTED)
        except Exception as error:
            if os.environ.get("SFUMATO_DEBUG"):
                raise
            return _failure(error)


def _failure(error: Exception) -> int:
    if hasattr(error, "format_message"):  # wrong usage, as typer or click say it
        return _say(error.format_message() or "see sfumato --help", MISUSED)
    if type(error).__name__ == "Abort":
        return _say("interrupted", INTERRUPTED)
    if isinstance(error, (ValueError, OSError, MemoryError)) or _ours(error):
        return _say(str(error) or type(error).__name__, MISUSED)
    return _say(f"a defect of sfumato: {type(error).__name__}: {error} (SFUMATO_DEBUG=1 shows where)", DEFECT)


def _ours(error: Exception) -> bool:
    module = sys.modules.get("sfumato.core.errors")
    return module is not None and isinstance(error, module.SfumatoError)


def _say(message: str, status: int) -> int:
    print(f"sfumato: {' '.join(message.split())}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: clean-up runs and no half-written file stays."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Said(logging.Handler):
    """What the library says while a command runs, a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Show what the library says of itself: what it keeps and where, and its warnings."""
    log, said = logging.getLogger("sfumato"), _Said(logging.INFO)
    level = log.level
    log.addHandler(said)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(said)
        log.setLevel(level)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Diffusion models: sample, train, measure, and reproduce published systems.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _start(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False
) -> None:
    with _left():
        if version:
            import sfumato

            print(f"sfumato {sfumato.__version__}")
        elif ctx.invoked_subcommand is None:
            print(ctx.get_help())


def command(
    name: str, group: typer.Typer = app, **options: Any
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register a function that returns an :class:`Answer` as a command, with ``--json`` added to its options.

    While it runs, whatever prints to stdout goes to stderr: with ``--json`` stdout holds the one object and nothing else.
    """

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(function)
        def run(*args: Any, as_json: bool, **kwargs: Any) -> None:
            with contextlib.redirect_stdout(sys.stderr), _told():
                answer = function(*args, **kwargs)
            show(answer, as_json)
            if answer.status:
                raise typer.Exit(answer.status)

        flag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
        extra = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=flag)
        signature = inspect.signature(function, eval_str=True)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
        run.__signature__ = signature.replace(parameters=[*parameters, extra], return_annotation=None)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*parameters, extra)}
        del run.__wrapped__  # type: ignore[attr-defined]
        group.command(name, **options)(run)
        return function

    return register


def show(answer: Answer, as_json: bool) -> None:
    """Print the record as JSON, or what is meant for people; of several processes only the first speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    with _left():
        if as_json:
            print(json.dumps(answer.record, ensure_ascii=False, allow_nan=False))
        elif answer.shown is not None:
            _shown(answer.shown)


def _shown(what: Any) -> None:
    """Print text or a renderable; rich would end the process where a reader left, which ``_left`` answers for."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise  # what rich has just caught

    wide = None if sys.stdout.isatty() else 200  # a pipe has no width: keep rows whole
    Screen(width=wide, markup=False, highlight=False, soft_wrap=isinstance(what, str)).print(what)


@contextlib.contextmanager
def _left() -> Iterator[None]:
    """All that is printed arrives, or nobody reads any more, which is not ours to complain about."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str | None = None) -> Any:
    """A rich table of some columns of the rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for row in rows:
        made.add_row(*(Text("" if row.get(name) is None else str(row[name])) for name in columns))
    return made


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """``told(done, total)`` moves a bar on a terminal's stderr, and does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def named_values(given: Iterable[str]) -> dict[str, str]:
    """{name: value} of options written NAME=VALUE. InputError where one is not."""
    from sfumato.core.errors import InputError

    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"a condition is written NAME=VALUE, e.g. vendor=noto; not {text!r}")
        found[name] = value
    return found


def scale_or_spec(guidance: str | None) -> float | str | None:
    """A scale as a number; anything else is the spec of a guidance."""
    try:
        return None if guidance is None else float(guidance)
    except ValueError:
        return guidance
