"""Solutions of a teacher's probability flow as a data set: matched noise and samples, and what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, Denoiser, Grid, InputError, Solver, Streams, trajectory
from sfumato.training.shards import Shards, write_shards

Conditions: TypeAlias = Callable[[Sequence[int]], Mapping[str, Tensor]]
"""indices -> conditions (B, *): a pure function of each index."""


class Trajectories:
    """Items first .. first + n of a teacher's trajectories, solved when they are asked for.

    Item i starts from the noise of stream (seed, i), as item i of ``sf.sample(..., seed=seed)`` does, whatever batch it is
    in. ``batch`` gives {"states": (B, K, *), "index": (B,)}: states[:, 0] is the very tensor that the solver started from
    and states[:, k] the state at ``times[k]``, all in solver coordinates.

    denoiser    the teacher, with its guidance around it
    shape       of one item
    conditions  indices -> what the teacher is told
    solver      a name, spec or object that draws no noise: a stochastic run has no matched pairs
    grid        a name, spec or object; None: the solver's own, or 'arctan'
    keep        which of the steps + 1 states to keep; None: all, 'ends': the pair

    Raises InputError for a solver that draws noise.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        n: int,
        shape: Sequence[int],
        *,
        conditions: Conditions | None = None,
        solver: str | Solver = "arc",
        grid: str | Grid | None = None,
        steps: int = 8,
        keep: Sequence[int] | str | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        self.denoiser, self.n, self.shape, self.conditions = denoiser, n, tuple(shape), conditions
        self.solver: Solver = solvers.registry.make(solver) if isinstance(solver, str) else solver
        chosen = grid or self.solver.grid or "arctan"
        self.grid: Grid = grids.registry.make(chosen) if isinstance(chosen, str) else chosen
        if self.solver.stochastic:
            raise InputError(
                f"{type(self.solver).__name__} draws noise, so its samples match no start: use a deterministic solver"
            )
        if n < 1 or first < 0:
            raise InputError(f"n = {n}, first = {first}: at least one item, counted from 0")
        self.steps, self.seed, self.first = steps, seed, first
        self.keep = [0, steps] if keep == "ends" else list(range(steps + 1)) if keep is None else [int(k) for k in keep]
        times: list[float] = self.grid(denoiser.process, steps, 1.0, 0.0).tolist()
        if not all(0 <= k <= steps for k in self.keep) or self.keep != sorted(set(self.keep)):
            raise InputError(f"keep = {keep}: rising numbers of states between 0 and {steps}, or 'ends'")
        self.times = [times[k] for k in self.keep]
        named = [v if isinstance(v, str) else repr(v) for v in (solver, grid or self.solver.grid or "arctan")]
        self.card = {
            "solver": named[0], "grid": named[1] if "<" not in named[1] else "fixed", "grid times": times,
            "times": self.times, "seed": seed, "first": first,
        }  # fmt: skip

    def __len__(self) -> int:
        return self.n

    @torch.no_grad()
    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items, solved now."""
        rows = [self.first + i for i in indices]
        key = Streams.of(self.seed, 1).seeds[0][0]
        device = next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))
        given = {} if self.conditions is None else self.conditions(rows)
        cond = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        ctx = Context(cond=cond, rng=Streams(tuple((key, i) for i in rows)), batch=len(rows), device=device)
        run = trajectory(self.denoiser, self.solver, self.grid, self.steps, shape=(len(rows), *self.shape), ctx=ctx)
        states: Any = [self.solver.read(st) for st in run]
        return {"states": torch.stack([states[k] for k in self.keep], 1), "index": torch.tensor(rows)}

    def write(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        per_shard: int = 1024,
        batch: int = 64,
        card: Mapping[str, Any] | None = None,
    ) -> Shards:
        """Solve all and keep them as safetensors shards with this card; a run that was cut off continues."""

        def kept(part: Mapping[str, Any]) -> dict[str, Any]:
            return {**part, "states": part["states"].to(dtype)}

        return write_shards(
            self, path, transform=kept, per_shard=per_shard, batch=batch, card={**self.card, **(card or {})}
        )


class Stored:
    """What :meth:`Trajectories.write` wrote, in one folder or several, as a data set for :class:`~sfumato.training.data.Batches`.

    ``batch`` gives {"states": (B, K, *), "index": (B,), "cond": conditions(indices)}; ``times`` are those of the states. Given,
    only the states at these times are read, which every folder must hold. Raises InputError where one does not.
    """

    def __init__(
        self, *paths: str | Path, conditions: Conditions | None = None, times: Sequence[float] | None = None
    ) -> None:
        self.parts = [Shards(path) for path in paths]
        if not self.parts:
            raise InputError("give at least one folder of trajectories")
        self.times: list[float] = list(self.parts[0].card["times"] if times is None else times)
        held = [part.card["times"] for part in self.parts]
        if any(not set(self.times) <= set(h) or (times is None and h != self.times) for h in held):
            raise InputError(f"states at {self.times} are wanted of every folder; they hold {held}")
        self.conditions = conditions
        kept = [[h.index(t) for t in self.times] for h in held]
        self._place = [(part, i, k) for part, k in zip(self.parts, kept, strict=True) for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._place)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items with their conditions."""
        states, index = [], []
        for part, i, kept in (self._place[k] for k in indices):
            row = part.batch([i])
            states.append(row["states"][:, kept])
            index.append(row["index"])
        fields: dict[str, Any] = {"states": torch.cat(states), "index": torch.cat(index)}
        if self.conditions is not None:
            fields["cond"] = dict(self.conditions(fields["index"].tolist()))
        return fields
