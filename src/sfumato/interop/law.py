"""What a diffusers scheduler's configuration says about its model: the noising law, the prediction, the labels, the
clipping.

Conventions. Index i of a table of N betas is t = (i + 1) / N and t = 0 is clean data; a flow's sigma is t. The times
of a run are asked of the scheduler itself, so none of its options is written here a second time.
"""

from __future__ import annotations

import copy
import math
import operator
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Posterior, State, Wrapper, linear
from sfumato.denoisers.parametrized import edm_row
from sfumato.interop._needs import need
from sfumato.processes import EDM, Flow, Table

KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


@dataclass(frozen=True, eq=False)
class Discrete(Table):
    """A table whose trajectories start from ``begin`` N(0, I), as the scheduler it was read from starts them."""

    begin: float = 1.0

    def prior(self, shape: Any, ctx: Context) -> State:
        """begin N(0, I); diffusers begins with 1 where sigma(1) is a little less."""
        return _noise(self, shape, ctx, self.begin)


@dataclass(frozen=True)
class Karras(EDM):
    """EDM whose trajectories start from ``begin`` N(0, I): sqrt(sigma_max^2 + 1) in diffusers."""

    begin: float = 80.0

    def prior(self, shape: Any, ctx: Context) -> State:
        """begin N(0, I)."""
        return _noise(self, shape, ctx, self.begin)


def _noise(process: Any, shape: Any, ctx: Context, std: float) -> State:
    like = torch.empty(tuple(shape), dtype=ctx.dtype, device=ctx.device)
    return linear(std, ctx.draw(process.space, like))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Law:
    """The facts of a scheduler that belong to the model.

    process   the noising law
    predicts  what the network says, as in :func:`sfumato.parametrized`
    label     t -> the label the network knows; ``time`` is its inverse
    schedule  the times the scheduler itself would visit, a Grid
    clip      the scheduler's clipping or thresholding of x0, Posterior -> Posterior, or None
    solver    the spec of our solver that does what the scheduler does, or of our default
    """

    process: Any
    predicts: str
    label: Callable[[Any], Any]
    time: Callable[[float], float]
    schedule: Schedule
    clip: Callable[[Posterior], Posterior] | None
    solver: str
    data_std: float = 0.5

    @staticmethod
    def of(scheduler: Any, options: Callable[[int], Mapping[str, Any]] | None = None) -> Law:
        """Read a scheduler; ``options(n)`` is what its pipeline passes to ``set_timesteps`` beside n.

        Raises InputError, with the reason, for what is not a Gaussian law of a known prediction.
        """
        config, name = scheduler.config, type(scheduler).__name__
        if name == "SolverScheduler":  # ours, for a model whose law it has read
            own: Law = scheduler.law
            schedule = Schedule(scheduler, own.process, own.label, own.time, options)
            return replace(own, schedule=schedule, solver=str(config["solver"]))
        _refuse(name, config)
        kind = KINDS.get(config.get("prediction_type", "epsilon"))
        n = config.get("num_train_timesteps", 1000)
        if name.startswith("EDM"):
            process: Any = Karras(config.sigma_min, config.sigma_max, begin=math.hypot(config.sigma_max, 1))
            facts = (process, "edm", partial(_edm_label, process), partial(_edm_time, process))
        elif "FlowMatch" in name or config.get("use_flow_sigmas"):
            facts = (Flow(), "flow", partial(operator.mul, n), partial(_flow_time, n))
        elif hasattr(scheduler, "alphas_cumprod") and kind not in (None, "flow"):
            table = _table(scheduler)
            process = Discrete(table.angles, begin=_begin(scheduler, table))
            facts = (process, kind, partial(_table_label, n), partial(_table_time, n))
        else:
            raise InputError(
                f"{name} with prediction_type {config.get('prediction_type')!r} says nothing that can be carried: a table "
                f"of alphas_cumprod with {', '.join(list(KINDS)[:3])}, flow matching or EDM can"
            )
        schedule = Schedule(scheduler, *facts[::2], facts[3], options)
        return Law(
            facts[0], facts[1], schedule.label, facts[3], schedule, _clip(scheduler), solver_of(scheduler),
            config.get("sigma_data", 0.5),
        )  # fmt: skip

    def posterior(self, output: Tensor, x: Tensor, t: float) -> Posterior:
        """The belief that a network's output at (x, t) stands for, clipped where the scheduler clips."""
        coef = self.process.coef(t)
        post = Posterior(output, edm_row(coef, self.data_std) if self.predicts == "edm" else self.predicts, x, coef)
        return post if self.clip is None else self.clip(post)

    def scaled(self, x: Tensor, t: float) -> Tensor:
        """The network's input: x itself, but for EDM x / sqrt(sigma^2 + data_std^2)."""
        if self.predicts != "edm":
            return x
        c = self.process.coef(t)
        return x / math.hypot(c.sigma, c.alpha * self.data_std)

    @property
    def begin(self) -> float:
        """The std of the noise a trajectory starts from."""
        return getattr(self.process, "begin", 1.0)


class Schedule:
    """The Grid of a diffusers scheduler: (process, n, start, stop) -> the times of its n steps.

    The first time is the scheduler's own (with 'leading' spacing earlier than 1) and the last is where it ends (1 / N
    with ``set_alpha_to_one=False``). With start < 1 it is the tail, of n steps, of a longer schedule: what an
    image-to-image pipeline runs. ``label(t)`` gives the very label the scheduler would show at one of these times.
    """

    def __init__(
        self,
        scheduler: Any,
        process: Any,
        label: Callable[[Any], Any],
        time: Callable[[float], float],
        options: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> None:
        self.scheduler, self.process, self._law, self._time = _plain(scheduler), process, label, time
        self.options, self._lock = options, threading.Lock()
        self._made: dict[Any, tuple[float, ...]] = {}
        self._labels: dict[float, float] = {}

    def __call__(self, process: Any, n: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        times = self.times(n)
        if stop != 0 and stop != times[-1]:
            raise InputError(f"this schedule runs to its end, t = {times[-1]}, not to {stop}: use another grid")
        return torch.tensor(times if start == 1 or start == times[0] else self._tail(n, start), dtype=torch.float64)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def label(self, t: Any) -> Any:
        """t -> the scheduler's label where t is one of its times, else the law's."""
        known = self._labels.get(t) if isinstance(t, float) else None
        return self._law(t) if known is None else known

    def cut(self, n: int, strength: float) -> Tensor:
        """The last int(n strength) steps of n: the times of a diffusers image-to-image run. Give them to ``grids.fixed``."""
        if not 0 < strength <= 1:
            raise InputError(f"strength = {strength}: more than 0, at most 1")
        kept = min(int(n * strength), n)
        if kept < 1:
            raise InputError(f"strength {strength} of {n} steps leaves none")
        return torch.tensor(self.times(n)[-kept - 1 :], dtype=torch.float64)

    def times(self, n: int, **options: Any) -> tuple[float, ...]:
        """The n + 1 times of n steps; ``options`` go to the scheduler's ``set_timesteps``."""
        given = {**(self.options(n) if self.options else {}), **options}
        key = (n, *((k, tuple(v) if hasattr(v, "__len__") else v) for k, v in sorted(given.items())))
        with self._lock:  # a scheduler keeps its run on itself; ours is a copy that one thread at a time may ask
            if key not in self._made:
                self._made[key] = self._asked(n, given)
        return self._made[key]

    def _asked(self, n: int, options: Mapping[str, Any]) -> tuple[float, ...]:
        scheduler = self.scheduler
        scheduler.set_timesteps(
            **({} if "timesteps" in options or "sigmas" in options else {"num_inference_steps": n}), **options
        )
        labels = [float(v) for v in scheduler.timesteps]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) == len(labels) + 1:
            times = [self._of_sigma(float(s), v) for s, v in zip(sigmas, [*labels, None], strict=True)]
        else:
            _warn(scheduler, labels, n)
            last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
            times = [*(self._time(v) for v in labels), 0.0 if last == 1 else self._time(0.0)]
        distinct = [i for i, t in enumerate(times) if i == 0 or t < times[i - 1]]
        self._labels |= {times[i]: labels[i] for i in distinct if i < len(labels)}
        return tuple(times[i] for i in distinct)

    def _of_sigma(self, sigma: float, label: float | None) -> float:
        if isinstance(self.process, Flow):
            return sigma
        if sigma == 0:
            return 0.0
        t = min(self.process.time(-math.log(sigma)), 1.0)
        exact = None if label is None else self._time(label)
        if (
            exact is not None
            and self.scheduler.config.get("rescale_betas_zero_snr")
            and exact > 1 - 5e-3
            and float(label or 0).is_integer()
        ):
            return exact  # sigma is no guide to the time where alpha goes to 0
        # a table's own points are exact, float32 sigmas are not: near alpha = 0 they lose the time
        return exact if exact is not None and abs(t - exact) < 1e-6 else t

    def _tail(self, n: int, start: float) -> tuple[float, ...]:
        for m in range(n, 50 * n + 50):
            inner = [t for t in self.times(m) if t < start]
            if len(inner) >= n:
                break
        if len(inner) != n:
            raise InputError(
                f"no schedule of this scheduler has {n} steps below t = {start}: try other steps, or cut()"
            )
        return (start, *inner)


def _refuse(name: str, config: Mapping[str, Any]) -> None:
    reasons = {
        "invert_sigmas": "time runs the other way",
        "stochastic_sampling": "it draws noise of its own at each step of a flow: choose a stochastic solver instead",
    }
    if "Inverse" in name:
        raise InputError(f"{name} only inverts: give the scheduler that samples, and invert with sf.invert")
    for key, reason in reasons.items():
        if config.get(key):
            raise InputError(f"{name} has {key}=True, which cannot be carried: {reason}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise InputError(f"{name} has timestep_type {config['timestep_type']!r}: only 'discrete' labels can be carried")
    if name.startswith("EDM") and config.get("prediction_type", "epsilon") != "epsilon":
        raise InputError(f"{name} with prediction_type {config['prediction_type']!r} cannot be carried; 'epsilon' can")


def _plain(scheduler: Any) -> Any:
    """A copy to ask for times; of a scheduler with several calls a step, the one-call scheduler of the same configuration."""
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    if type(scheduler).__name__ == "PNDMScheduler":
        return type(scheduler).from_config({**config, "skip_prk_steps": True})
    if getattr(scheduler, "order", 1) > 1:
        diffusers = need("diffusers")
        flow = "FlowMatch" in type(scheduler).__name__
        return (diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.EulerDiscreteScheduler).from_config(
            config
        )
    return copy.deepcopy(scheduler)


def _table(scheduler: Any) -> Table:
    """The table of alphas. With zero-terminal SNR it ends at exactly 0, also where a scheduler that runs in sigma keeps
    2^-12 in its place: its first step then differs from ours by that much."""
    if scheduler.config.get("rescale_betas_zero_snr"):
        return Table.of(torch.cumprod(1 - scheduler.betas, 0))
    return Table.of(scheduler.alphas_cumprod)


def _begin(scheduler: Any, table: Table) -> float:
    """init_noise_sigma in x's own scale: schedulers that run in sigma start from sigma(1), the others from 1."""
    first = scheduler.init_noise_sigma
    alpha, sigma, *_ = table.coef(1.0)
    return sigma if float(first) != 1 and scheduler.config.get("timestep_spacing") in ("linspace", "trailing") else 1.0


# Functions and not closures, so that a scheduler made of them can be pickled and copied.


def _table_label(n: int, t: Any) -> Any:
    """N t - 1, and 0 below the first discrete time: no network was shown a smaller one (diffusers does the same)."""
    return (t * n - 1).clamp(min=0) if isinstance(t, Tensor) else max(t * n - 1, 0.0)


def _table_time(n: int, label: float) -> float:
    return (label + 1) / n


def _flow_time(n: int, label: float) -> float:
    return label / n


def _edm_label(process: Any, t: Any) -> Any:
    sigma = process.coef(t).sigma
    return 0.25 * (sigma.log() if isinstance(sigma, Tensor) else math.log(sigma))


def _edm_time(process: Any, label: float) -> float:
    return min(float(process.time(-4 * label)), 1.0)


def _warn(scheduler: Any, labels: list[float], n: int) -> None:
    """DDIM of diffusers steps to t - N // n, which is not always the next time it visits; we step to that one."""
    gap = scheduler.config.num_train_timesteps // n
    if type(scheduler).__name__ == "DDIMScheduler" and any(
        a - b != gap for a, b in zip(labels, labels[1:], strict=False)
    ):
        warnings.warn(
            f"DDIMScheduler steps to t - {gap}, not to the next of its {n} times; here each step ends where the next begins",
            stacklevel=2,
        )


class Clipped(Wrapper):
    """A denoiser whose beliefs are clipped as a scheduler does it, after all guidance."""

    def __init__(self, inner: Denoiser, clip: Callable[[Posterior], Posterior]) -> None:
        super().__init__(inner)
        self.clip = clip

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        return self.clip(self.inner(x, t, ctx))


def _clip(scheduler: Any) -> Callable[[Posterior], Posterior] | None:
    """clip_sample: x0 in [-r, r]; thresholding (Saharia et al. 2022): x0 in [-s, s] / s with s a quantile of |x0| an
    item.

    DDIM keeps the eps beside the clipped x0 (unless told otherwise), the others keep x.
    """
    config = scheduler.config
    keep = ("eps",) if type(scheduler).__name__.startswith("DDIM") else ()
    if config.get("thresholding"):
        ratio, top = config.dynamic_thresholding_ratio, config.sample_max_value
        return partial(_clipped, keep, partial(_thresholded, ratio, top))
    if config.get("clip_sample"):
        bound = config.get("clip_sample_range", 1.0)
        return partial(_clipped, keep, partial(torch.clamp, min=-bound, max=bound))
    return None


def _clipped(keep: tuple[str, ...], bounded: Callable[[Tensor], Tensor], post: Posterior) -> Posterior:
    return post.but(keep, x0=bounded(post.mean))


def _thresholded(ratio: float, top: float, x0: Tensor) -> Tensor:
    s = torch.quantile(x0.flatten(1).abs().float(), ratio, dim=1).clamp(1, top).to(x0.dtype)
    s = s.view(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -s, s) / s


def solver_of(scheduler: Any) -> str:
    """The spec of our solver that takes the scheduler's steps; our default where we have none that is the same."""
    name, config = type(scheduler).__name__, scheduler.config
    if name == "DPMSolverMultistepScheduler" and config.algorithm_type == "dpmsolver++":
        exact = {1: "ddim", 2: "dpm-solver++", 3: "dpm-solver++3m"}[config.solver_order]
        if config.solver_order == 2 and config.solver_type == "midpoint":
            early = config.final_sigmas_type == "sigma_min" and config.lower_order_final
            return f"dpm-solver++(rule='midpoint'{', taper=True' if early else ''})"
        return exact
    if name == "UniPCMultistepScheduler" and config.solver_type == "bh2" and config.predict_x0:
        return f"unipc(order={config.solver_order})"
    return next((spec for part, spec in SOLVERS.items() if part in name), DEFAULT)


DEFAULT = "dpm-solver++"
SOLVERS = {"EulerAncestral": "ddpm", "Euler": "euler", "Heun": "heun", "DDIM": "ddim", "DDPM": "ddpm"}
