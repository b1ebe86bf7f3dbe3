"""Our solvers as diffusers schedulers: ``pipe.scheduler = sf.as_diffusers_scheduler("dpm-solver++", like=pipe.scheduler)``."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato import grids, processes, solvers
from sfumato.core import Grid, InputError, Solver, Streams
from sfumato.interop._needs import need
from sfumato.interop.law import Law, Schedule
from sfumato.interop.replay import Replay, calls, planned

diffusers = need("diffusers")
# A pipeline's folder names this module, and diffusers looks for the base classes in it.
SchedulerMixin: Any = diffusers.SchedulerMixin
ConfigMixin: Any = diffusers.ConfigMixin
_configuration: Any = need("diffusers.configuration_utils")
_schedulers: Any = need("diffusers.schedulers.scheduling_utils")

OWN = "own"


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """See :func:`as_diffusers_scheduler`.

    solver  a spec such as "dpm-solver++(order=3)"
    grid    a spec such as "karras", or "own": the times of the scheduler it stands for
    like    the configuration of that scheduler, with its ``_class_name``; or {"process": name, "numbers": {...},
            "predicts": ...} for a process of this library, whose label is t itself

    ``order`` is the number of calls a step costs: ``set_timesteps(n)`` makes n steps, of ``order`` calls each but
    perhaps the last, as diffusers' own Heun does.
    """

    _run: Replay | None
    _given: Any
    _index: Any  # calls answered, or None
    _begin: int | None

    _compatibles = [e.name for e in _schedulers.KarrasDiffusionSchedulers]

    @_configuration.register_to_config
    def __init__(self, solver: str = "dpm-solver++", grid: str = OWN, like: Mapping[str, Any] | None = None) -> None:
        self._become(_made(solvers, solver), grid, None if like is None else dict(like))

    def _become(self, solver: Solver, grid: str | Grid, like: dict[str, Any] | None) -> None:
        if like is None:
            raise InputError("give like=, the scheduler (or its configuration) whose model this one is to serve")
        self.solver, self.law, self.base = solver, *_law(like)
        self.grid: Any = self.law.schedule if grid == OWN else _made(grids, grid)
        if self.grid is None:
            raise InputError("a process of this library has no schedule of its own: give grid=")
        self.init_noise_sigma = self.law.begin
        self.num_inference_steps: int | None = None
        some = planned(solver, self.law.process, [1.0, 0.5, 0.0])
        first = calls(solver, self.law.process, some, 2)[0]  # refuses solvers that choose their times as they go
        self.order = round(solver.nfe) if math.isfinite(solver.nfe) else len(first)
        self.alphas_cumprod = getattr(self.base, "alphas_cumprod", None)
        self._times: list[float] = []
        self._total = 0
        self._asked: list[float] = []
        self._beginnings: dict[int, int] = {}
        self.timesteps = torch.empty(0)
        self._forget()

    # what pipelines read -----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The configuration, with the entries of the scheduler it stands for, which pipelines look up."""
        own = super().config
        like = own.get("like") or {}
        default = [*own.get("_use_default_values", ()), *like.get("_use_default_values", ())]
        named = {k: v for k, v in like.items() if not k.startswith("_")}
        return _configuration.FrozenDict({**named, **own, "_use_default_values": default})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From its own configuration, or from another scheduler's: ``from_config(pipe.scheduler.config, solver="heun")``."""
        given: dict[str, Any] = dict(config)
        if "like" not in given:
            given = {"like": given}
        known = {k: given[k] for k in ("solver", "grid", "like") if k in given}
        chosen = {k: kwargs.pop(k) for k in ("solver", "grid", "like") if k in kwargs}
        made = cls(**(known | chosen))
        return (made, kwargs) if return_unused_kwargs else made

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers does. Raises InputError for a solver or grid that was given as an object."""
        for name in ("solver", "grid"):
            if not isinstance(self._internal_dict[name], str):
                raise InputError(f"to save this scheduler give its {name} as a spec such as 'dpm-solver++(order=3)'")
        super().save_config(*args, **kwargs)

    @property
    def step_index(self) -> int | None:
        """How many calls were answered."""
        return self._index

    @property
    def begin_index(self) -> int | None:
        """The call to begin with, if a pipeline said so."""
        return self._begin

    @property
    def sigmas(self) -> Tensor:
        """sigma / alpha (a flow's: sigma) at each call, and at the end."""
        return torch.tensor([self._sigma(t) for t in (*self._asked, self._times[-1])], dtype=torch.float32)

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))

    # the run -----------------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Choose the times of a run: ``timesteps`` is then what each call is labelled.

        ``timesteps`` gives labels of the steps instead; ``sigmas`` and ``mu``, which some pipelines always pass, go to
        the scheduler this one stands for, and mean nothing to a grid of ours.
        """
        self._forget()
        given = next((v for v in (timesteps, sigmas) if v is not None), None)
        n = len(given) if given is not None else num_inference_steps
        if not n:
            raise InputError("set_timesteps needs num_inference_steps, timesteps or sigmas")
        grid = self._chosen(int(n), timesteps, {"sigmas": sigmas, "mu": mu})
        self._times, self._total = planned(self.solver, self.law.process, grid), len(grid) - 1
        by_step = calls(self.solver, self.law.process, self._times, self._total)
        self._asked = [t for step in by_step for t in step]
        starts = [sum(map(len, by_step[:j])) for j in range(len(by_step))]
        self._beginnings = {at: j for j, at in enumerate(starts)}
        self.num_inference_steps = len(by_step)
        labels = [self.law.label(t) for t in self._asked]
        self.timesteps = torch.tensor(
            labels, dtype=torch.float64 if self.base is None else torch.float32, device=device
        )
        if self.base is not None and all(float(v).is_integer() for v in self.timesteps):
            self.timesteps = self.timesteps.long()  # what networks of a table are shown, and what pipelines compare

    def _chosen(self, n: int, timesteps: Any, options: Mapping[str, Any]) -> list[float]:
        if timesteps is not None:
            return [*(self.law.time(float(v)) for v in timesteps), 0.0]
        if isinstance(self.grid, Schedule):
            return list(self.grid.times(n, **{k: v for k, v in options.items() if v is not None}))
        return self.grid(self.law.process, n, 1.0, 0.0).tolist()  # type: ignore[no-any-return]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this call: image-to-image pipelines do. It must be the first of a step."""
        self._begin = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself, scaled only for EDM models."""
        if self.law.predicts != "edm":
            return sample
        return self.law.scaled(sample, self._asked[self._at(timestep)])

    @torch.no_grad()
    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """Tell the solver the network's output at ``sample``: the state it asks about next, at the end the result.

        A sample that was changed since (inpainting blends known pixels in) is taken over where a step begins. Noise
        comes from streams seeded by ``generator``, one a sample of the batch. Computed in float32 at least.
        """
        if self.num_inference_steps is None:
            raise InputError("call set_timesteps first")
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self._run is None:
            self._index = self._at(timestep)
            self._run = self._begun(x, generator)
        elif not (sample is self._given or torch.equal(sample, self._given)):
            self._run.edit(x)
        run, output = self._run, model_output.to(x.dtype)
        if output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]  # a learned variance, of no use to these solvers
        run.answer(self.law.posterior(output, run.x, run.t))
        self._given = run.x.to(sample.dtype)
        self._index += 1
        out = self._given
        if run.done:
            self._run, self._begin = None, None
        return _schedulers.SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at these labels, one an item."""
        times = torch.tensor([self._time(v) for v in timesteps.flatten().tolist()], dtype=torch.float64)
        c = self.law.process.coef(times.expand(len(original_samples)) if len(times) == 1 else times)
        alpha, sigma = (v.to(original_samples).view(-1, *[1] * (original_samples.ndim - 1)) for v in c[:2])
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same, as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Which call has this label: the first that begins a step."""
        labels = self.timesteps if schedule_timesteps is None else schedule_timesteps
        places = [i for i, v in enumerate(labels.tolist()) if v == float(timestep)]
        if not places:
            raise InputError(
                f"timestep {float(timestep)} is none of this run's: {[round(v, 2) for v in labels.tolist()]}"
            )
        return next((i for i in places if i in self._beginnings), places[0])

    def _at(self, timestep: Any) -> int:
        if self._run is not None:
            return self._index or 0
        return self.index_for_timestep(timestep) if self._begin is None else self._begin

    def _begun(self, x: Tensor, generator: Any) -> Replay:
        if self._index not in self._beginnings:
            raise InputError(f"a run cannot begin at call {self._index}: steps begin at {sorted(self._beginnings)}")
        streams = streams_of(generator, len(x)) if self.solver.stochastic else None
        first = self._beginnings[self._index]
        return Replay(self.solver, self.law.process, self._times, x, streams, first, self._total)

    def _time(self, label: float) -> float:
        """The time of a label: exactly where this run has it."""
        known = [t for t, v in zip(self._asked, self.timesteps.tolist(), strict=True) if v == label]
        return known[0] if known else min(max(self.law.time(label), 0.0), 1.0)

    def _sigma(self, t: float) -> float:
        c = self.law.process.coef(t)
        return (
            c.sigma if isinstance(self.law.process, processes.Flow) else c.sigma / c.alpha if c.alpha else float("inf")
        )

    def _forget(self) -> None:
        self._run, self._given, self._index, self._begin = None, None, None, None


def as_diffusers_scheduler(
    solver: str | Solver = "dpm-solver++", grid: str | Grid | None = None, *, like: Any
) -> SolverScheduler:
    """Any solver whose times are known before the run as a diffusers scheduler.

    solver  a name, a spec, or an object (which cannot be saved)
    grid    the same; default: the times of ``like``
    like    the scheduler, its configuration, or the pipeline whose model it is to serve: noising law, prediction,
            labels and clipping are read from it

    ``pipe.scheduler = as_diffusers_scheduler("heun", "karras", like=pipe.scheduler)``. A solver of several calls a
    step says so in ``order``. Raises InputError for solvers that choose their times as they go.
    """
    like = getattr(like, "scheduler", like)
    config = dict(like) if isinstance(like, Mapping) else {**_plain(like.config), "_class_name": type(like).__name__}
    config = dict(config["like"]) if "like" in config else config
    spec = isinstance(solver, str) and (grid is None or isinstance(grid, str))
    made = SolverScheduler(
        solver if isinstance(solver, str) else "ddim", grid if isinstance(grid, str) else OWN, config
    )
    if not spec:
        made._become(_made(solvers, solver), OWN if grid is None else grid, config)
        made.register_to_config(solver=solver, grid=OWN if grid is None else grid)
    return made


def _made(registry: Any, given: Any) -> Any:
    return registry.registry.make(given) if isinstance(given, str) else given


def _plain(config: Any) -> dict[str, Any]:
    """JSON-able entries only: arrays of betas become lists."""
    return {k: v.tolist() if hasattr(v, "tolist") else copy.copy(v) for k, v in dict(config).items()}


def _law(like: Mapping[str, Any]) -> tuple[Law, Any]:
    """(law, scheduler) of a scheduler's configuration; (law, None) of a process of this library."""
    if "process" in like:
        numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in like["numbers"].items()}
        process = getattr(processes, like["process"])(**numbers)
        facts = (process, like["predicts"], _same, _same)
        return Law(*facts, None, None, "dpm-solver++", like.get("data_std", 0.5)), None  # type: ignore[arg-type]
    name = str(like.get("_class_name"))
    if not hasattr(diffusers, name):
        raise InputError(
            f"like= is the configuration of {name!r}, which is no scheduler of diffusers {diffusers.__version__}"
        )
    base = getattr(diffusers, name).from_config({k: v for k, v in like.items() if k != "_class_name"})
    return Law.of(base), base


def _same(t: Any) -> Any:
    return t


def streams_of(generator: Any, n: int) -> Streams:
    """One stream an item; a draw of the generator seeds them, so that it moves on as it does in diffusers."""
    if isinstance(generator, (list, tuple)) and len(generator) == n:
        return Streams.of([_seed(g) for g in generator], n)
    return Streams.of(_seed(generator[0] if isinstance(generator, (list, tuple)) else generator), n)


def _seed(generator: Any) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))
