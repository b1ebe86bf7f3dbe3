"""The sampler card: how to sample a model, what that was tuned on, and what it gained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import grids, solvers
from sfumato.acceleration.keeping import digest
from sfumato.core import Denoiser, Grid, InputError, Solver
from sfumato.files import write_atomically
from sfumato.solvers.empirical import DPMSolverV3, EmpiricalStatistics
from sfumato.solvers.scheduled import Scheduled, Subspace
from sfumato.tuning.scales import scaled
from sfumato.tuning.steps import planned

FORMAT, STATISTICS = 1, ("lams", "l", "s", "b")
START = "start."  # before the names of a start's tensors


def fingerprint(denoiser: nn.Module) -> str:
    """SHA-256, shortened, of a denoiser's law and of every tensor it holds: buffers, parameters, an oracle's numbers.

    Guidance is not part of it: give the denoiser without.
    """
    facts = repr(getattr(denoiser, "process", None)), str(getattr(denoiser, "predicts", type(denoiser).__name__))
    tensors = dict(denoiser.state_dict())
    held = getattr(denoiser, "distribution", None)
    tensors |= {k: v for k, v in vars(held).items() if isinstance(v, Tensor)} if held is not None else {}
    return digest(facts, tensors)


def _scheduled(numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> Solver:
    """A Scheduled from its moves."""
    return Scheduled(tuple(numbers["moves"]), numbers["free"])


def _subspace(numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> Solver:
    """A Subspace from its nodes, and its rows without the padding."""
    rows, free = tensors["rows"].tolist(), numbers["free"]
    cut = tuple(tuple(row[: i + 2 - free]) for i, row in enumerate(rows))
    return Subspace(tuple(numbers["nodes"]), cut, numbers["form"], free)


def _empirical(numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> Solver:
    """A DPM-Solver-v3 with the statistics of the card."""
    statistics = EmpiricalStatistics(*(tensors[name] for name in STATISTICS))
    return DPMSolverV3(statistics, **numbers)


BUILDERS: dict[str, Callable[[dict[str, Any], Mapping[str, Tensor]], Solver]] = {
    "scheduled": _scheduled,
    "subspace": _subspace,
    "dpm-solver-v3": _empirical,
}
"""How a solver comes out of a card: (its numbers, the card's tensors) -> Solver. Other names are made by the registry."""


def described(solver: Solver | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON values, tensors) from which :meth:`SamplerCard.solver` makes the solver again. A name or spec describes itself."""
    if isinstance(solver, str):
        return {"spec": solver}, {}
    if isinstance(solver, Scheduled):
        return {"name": "scheduled", **solver.spec()}, {}
    if isinstance(solver, Subspace):
        rows = torch.zeros(len(solver.rows), len(solver.rows) + 1, dtype=torch.float64)
        for i, row in enumerate(solver.rows):
            rows[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return {"name": "subspace", "nodes": list(solver.nodes), "form": solver.form, "free": solver.free}, {
            "rows": rows
        }
    if isinstance(solver, DPMSolverV3) and solver.statistics is not None:
        numbers = {name: getattr(solver, name) for name in ("order", "corrector", "pseudo", "taper")}
        return {"name": "dpm-solver-v3", **numbers}, {name: getattr(solver.statistics, name) for name in STATISTICS}
    raise InputError(
        f"a card keeps a solver as a spec such as 'dpm-solver++(order=3)', not as a {type(solver).__name__}"
    )


@dataclass(frozen=True, eq=False)
class SamplerCard:
    """One sampler of one model. It holds numbers only: JSON, and tensors where there are any.

    made_by      the method: 'untuned' | 'usf' | 'olss' | 'subspace' | 'autodiffusion' | ...
    description  of the solver, see :func:`described`
    times        the very times to visit, or None with a spec of a grid in ``grid_spec``
    nfe          denoiser calls an item
    skips        for each step the blocks that are left out
    scales       for each step a coefficient for each skip connection of a U-Net, see :func:`sfumato.tuning.scales.scaled`
    tensors      coefficients, statistics, start tensors, by name
    model, fingerprint, process, guidance (a scale or a spec)   what it was tuned on
    seeds        {'fitting', 'choosing', 'reporting'}: start noises; none is in two of them
    seconds      that the tuning took
    before, after  figures of the model's own sampler and of this one at ``nfe`` calls, on the reporting noises
    rows         all that was compared
    begins       the start that a run begins from instead of the prior's noise, where it has one of its own: :meth:`starting`
    anyway       use it with any model: :meth:`unchecked`
    """

    made_by: str
    description: Mapping[str, Any]
    steps: int
    nfe: float
    times: tuple[float, ...] | None = None
    grid_spec: str | None = None
    skips: tuple[tuple[str, ...], ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    start: float = 1.0
    stop: float = 0.0
    model: str = ""
    fingerprint: str = ""
    process: str = ""
    guidance: float | str | None = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    begins: Mapping[str, Any] | None = None
    anyway: bool = False
    scales: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if (self.times is None) == (self.grid_spec is None):
            raise InputError("a card names either its times or the spec of its grid, not both or neither")
        if self.times is not None and len(self.times) != self.steps + 1:
            raise InputError(f"{self.steps} steps visit {self.steps + 1} times, not {len(self.times)}")

    def solver(self) -> Solver:
        """The solver."""
        numbers = dict(self.description)
        if "spec" in numbers:
            return solvers.registry.make(numbers["spec"])  # type: ignore[no-any-return]
        name = numbers.pop("name")
        try:
            return BUILDERS[name](numbers, self.tensors) if name in BUILDERS else solvers.get(name, **numbers)
        except KeyError as error:
            raise InputError(f"this card's {name!r} solver lacks {error}: tune again") from error

    def grid(self) -> Grid:
        """The grid."""
        return grids.fixed(self.times) if self.times is not None else grids.registry.make(self.grid_spec or "")

    def starting(self, start: Any) -> SamplerCard:
        """The same card with runs that begin from ``start``: a TransportStart ('dpm-ot') or a BoundaryCondition ('optimal-bc').

        InputError where the card's times are fixed and begin elsewhere than it.
        """
        if self.times is not None and self.times[0] != start.time:
            raise InputError(
                f"this card's times begin at t = {self.times[0]}, and the start is one at t = {start.time}"
            )
        kept = {k: v for k, v in self.tensors.items() if not k.startswith(START)}
        tensors = kept | {START + k: v for k, v in start.tensors().items()}
        return replace(self, start=start.time, begins={"name": start.name, **start.config()}, tensors=tensors)

    def begin(self) -> Any:
        """The start, ``start(process, shape, ctx) -> x`` raw at t = ``start``; None is the prior's noise."""
        if self.begins is None:
            return None
        from sfumato.tuning.boundary import BoundaryCondition
        from sfumato.tuning.semidiscrete import TransportStart

        known: dict[str, Any] = {c.name: c for c in (TransportStart, BoundaryCondition)}
        config = dict(self.begins)
        name = config.pop("name")
        if name not in known:
            raise InputError(f"this card begins from a {name!r} start: known are {', '.join(known)}")
        held = {k.removeprefix(START): v for k, v in self.tensors.items() if k.startswith(START)}
        return known[name].of(held, config)

    def prepared(self, denoiser: Denoiser) -> Denoiser:
        """The (guided) denoiser as the card runs it: with the card's blocks left out and skip connections scaled."""
        return scaled(planned(denoiser, self.skips), self.scales)

    def check(self, denoiser: nn.Module, guidance: float | str | None = None) -> None:
        """Refuse another model or another guidance than the card was tuned on (InputError); ``unchecked`` accepts all."""
        if self.anyway:
            return
        found = fingerprint(denoiser)
        if self.fingerprint and found != self.fingerprint:
            raise InputError(
                f"this sampler card was tuned on {self.model or 'another model'} (fingerprint {self.fingerprint}), and this "
                f"model's fingerprint is {found}: tune it, or use the card all the same with card.unchecked() or --force"
            )
        tuned, wanted = (g.replace(" ", "") if isinstance(g, str) else g for g in (self.guidance, guidance))
        if wanted is not None and tuned is not None and wanted != tuned:
            raise InputError(
                f"this sampler card was tuned at guidance {_said(self.guidance)}, not {_said(guidance)}: tune at that, leave "
                "guidance out, or use the card all the same with card.unchecked() or --force"
            )

    def unchecked(self) -> SamplerCard:
        """The same card for any model and guidance."""
        return replace(self, anyway=True)

    def save(self, path: str | Path) -> Path:
        """Write ``NAME.json``, and ``NAME.safetensors`` beside it where there are tensors; each whole or not at all."""
        from safetensors.torch import save

        path = _json(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = self.record()
        if self.tensors:
            data = save({k: v.detach().cpu().contiguous().clone() for k, v in self.tensors.items()})
            record["tensors"] = {
                "file": path.with_suffix(".safetensors").name,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            write_atomically(path.with_suffix(".safetensors"), data)
        write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        return path

    def record(self) -> dict[str, Any]:
        """All but the tensors, as JSON values."""
        left_out = ("tensors", "anyway")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return {"format": FORMAT, "kind": "sampler", **json.loads(json.dumps(values, default=list)), "tensors": None}

    @staticmethod
    def load(path: str | Path, anyway: bool = False) -> SamplerCard:
        """Read a card. FileNotFoundError where there is none, InputError for a damaged or a foreign file."""
        path = _json(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no sampler card {path}: `sfumato tune MODEL --out {path}` makes one")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("kind", None) != "sampler" or record.pop("format", None) != FORMAT:
                raise InputError(f"{path} is no sampler card of format {FORMAT}: `sfumato tune` writes one")
            tensors = _tensors(path, record.pop("tensors"))
            record["times"] = None if record["times"] is None else tuple(record["times"])
            record["skips"] = tuple(tuple(names) for names in record["skips"])
            record["scales"] = tuple(tuple(row) for row in record.get("scales", ()))
            return SamplerCard(**record, tensors=tensors, anyway=anyway)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): tune again") from error

    @staticmethod
    def of(card: SamplerCard | str | Path) -> SamplerCard:
        """The card itself, or the one in a file."""
        return card if isinstance(card, SamplerCard) else SamplerCard.load(card)


def _said(guidance: float | str | None) -> str:
    """A guidance as a message names it."""
    return guidance if isinstance(guidance, str) else f"{guidance:g}"


def _json(path: str | Path) -> Path:
    """The path, which ends in .json (InputError otherwise)."""
    path = Path(path)
    if path.suffix != ".json":
        raise InputError(f"{path}: a sampler card is a .json file (its tensors go beside it)")
    return path


def _tensors(path: Path, entry: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The tensors of a record's entry, from the file beside the card, where its digest is right (InputError otherwise)."""
    if entry is None:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = path.parent / Path(entry["file"]).name
    try:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise InputError(f"{file} is not what {path.name} was saved with: copy both files of a card together")
        return load(data)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}): copy both files of a card together") from error
