"""Rows of figures: printed, saved, read back."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.core.errors import InputError, MissingExtra
from sfumato.evaluation.measurement import Measurement

FORMATS = (".json", ".csv", ".md")


@dataclass(frozen=True)
class Table:
    """Rows of JSON-able values in reading order; columns are the union of the rows' keys in order of appearance.

    A :class:`Measurement` may stand for a whole row or for one value of a row.
    """

    rows: tuple[dict[str, Any], ...] = field(default=())
    title: str = ""

    def __init__(self, rows: Iterable[Measurement | Mapping[str, Any]], title: str = "") -> None:
        plain = (row.row() if isinstance(row, Measurement) else row for row in rows)
        object.__setattr__(self, "rows", tuple({str(k): _plain(k, v) for k, v in row.items()} for row in plain))
        object.__setattr__(self, "title", title)

    @property
    def columns(self) -> list[str]:
        """Every key that a row has."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of that name, of a table with a measurement a row."""
        found = [row for row in self.rows if row.get("name") == name]
        if len(found) != 1:
            held = ", ".join(str(row["name"]) for row in self.rows if "name" in row) or "none"
            raise InputError(f"{len(found)} rows are named {name!r}; there are: {held}")
        return Measurement.from_row(found[0])

    def where(self, **cell: Any) -> Table:
        """The rows that hold these values."""
        unknown = [key for key in cell if key not in self.columns]
        if unknown:
            raise InputError(f"no column {', '.join(unknown)}; there are: {', '.join(self.columns)}")
        kept = [row for row in self.rows if all(key in row and row[key] == value for key, value in cell.items())]
        return Table(kept, self.title)

    def column(self, name: str) -> list[Any]:
        """One value a row, None where a row has none; measurements come back as such."""
        if name not in self.columns:
            raise InputError(f"no column {name!r}; there are: {', '.join(self.columns)}")
        return [_revived(row.get(name)) for row in self.rows]

    def json(self) -> str:
        """{"title", "rows"} as strict JSON."""
        return json.dumps({"title": self.title, "rows": list(self.rows)}, indent=2, allow_nan=False)

    def csv(self) -> str:
        """A header and a line a row; a measurement inside a row becomes name, name low and name high."""
        out = io.StringIO()
        rows = [_spread(row) for row in self.rows]
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def markdown(self) -> str:
        """A Markdown table of what :meth:`show` prints."""
        columns, lines, common = self._shown()
        bars = [columns, ["---"] * len(columns), *lines]
        head = f"**{self.title}**\n\n" if self.title else ""
        body = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in bars)
        return head + body + (f"\n{common}\n" if common else "")

    def show(self) -> None:
        """Print it; what all rows have in common goes below.

        Raises:
            MissingExtra: rich is not installed.
        """
        try:
            from rich.console import Console
            from rich.table import Table as Printed
        except ImportError:
            raise MissingExtra("rich", extra="cli") from None
        columns, lines, common = self._shown()
        printed = Printed(title=self.title or None, caption=common or None)
        for i, name in enumerate(columns):
            printed.add_column(name, no_wrap=i == 1, overflow="fold")
        for line in lines:
            printed.add_row(*line)
        Console(markup=False).print(printed)

    def save(self, path: str | Path) -> Path:
        """Write .json, .csv or .md by the suffix; the file appears whole or not at all.

        Raises:
            InputError: another suffix, or a folder that does not exist.
        """
        path = Path(path)
        if path.suffix not in FORMATS:
            raise InputError(f"{path.name}: a table is saved as {', '.join(FORMATS)}")
        if not path.parent.is_dir():
            raise InputError(f"no folder {path.parent}: make it first")
        text = {".json": self.json, ".csv": self.csv, ".md": self.markdown}[path.suffix]()
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=True)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return path

    @staticmethod
    def load(path: str | Path) -> Table:
        """Read what ``save`` wrote as .json."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return Table(found["rows"], found["title"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a table saved as .json ({type(error).__name__})") from error

    def _shown(self) -> tuple[list[str], list[list[str]], str]:
        """Column names, cells as text, and what rows of measurements have in common.

        Empty and constant columns of such rows are not shown as columns.
        """
        whole = bool(self.rows) and all(isinstance(_revived(row), Measurement) for row in self.rows)
        rows = [_joined(row) for row in self.rows] if whole else list(self.rows)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = {key: [_text(row.get(key)) for row in rows] for key in columns}
        common = []
        if whole:
            columns = [key for key in columns if any(cells[key])]
            if len(rows) > 1:
                same = [key for key in columns if key not in ("name", "value") and len(set(cells[key])) == 1]
                common = [f"{key.replace('_', ' ')}: {cells[key][0]}" for key in same]
                columns = [key for key in columns if key not in same]
        return columns, [[cells[key][i] for key in columns] for i in range(len(rows))], "; ".join(common)


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Measurement):
        return value.row()
    if isinstance(value, float) and math.isnan(value):
        raise InputError(f"{key} is not a number (NaN): a table holds figures only")
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise InputError(
            f"{key} = {value!r}: a table holds numbers, texts, lists and measurements; .item() makes one of a tensor"
        ) from None
    return value


def _revived(value: Any) -> Any:
    is_row = isinstance(value, dict) and {"name", "value", "low", "high", "n"} <= set(value)
    return Measurement.from_row(value) if is_row else value


def _joined(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a measurement as it is read: name and direction, value and interval, counts, remarks."""
    figure = _text(Measurement.from_row(row))
    arrow = {True: " ↑", False: " ↓", None: ""}[row.get("higher_is_better")]
    taken = ("name", "value", "low", "high", "higher_is_better", "interval", "note")
    rest = {key: value for key, value in row.items() if key not in taken}
    remarks = "; ".join(row[key] for key in ("interval", "note") if row.get(key))
    return {"name": f"{row['name']}{arrow}", "value": figure, **rest, "remarks": remarks}


def _spread(row: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in row.items():
        found = _revived(value)
        if isinstance(found, Measurement):
            out |= {key: found.value, f"{key} low": found.low, f"{key} high": found.high}
        else:
            out[key] = value if isinstance(value, str | int | float | None) else json.dumps(value)
    return out


def _text(value: Any) -> str:
    found = _revived(value)
    if isinstance(found, Measurement):
        return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
    if isinstance(found, float):
        return f"{found:.4g}"
    return "" if found is None else str(found)
