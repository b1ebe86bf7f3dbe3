"""Objectives of distillation on teachers whose flow is known in closed form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato import grids, oracles, solvers
from sfumato.core import Context, Denoiser, InputError, Posterior, linear, sample
from sfumato.denoisers import lora, parametrized
from sfumato.denoisers.boundaries import boundary, consistent
from sfumato.networks.scalars import settled, with_scalars
from sfumato.objectives.distill import (
    AnnealingReflow,
    Bootstrap,
    Consistency,
    DenoisingGAN,
    DistributionMatching,
    FlowGuided,
    SamplerMMD,
    Segments,
    TimeAware,
    Unrolled,
    matched,
    squared_mmd,
)
from sfumato.objectives.distill._common import moved
from sfumato.processes import EDM, VE, VP, Cosine, Flow
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches
from sfumato.training.trajectories import Stored, Trajectories

LAWS = {"vp": VP(), "flow": Flow(), "edm": EDM(), "cosine": Cosine(), "ve": VE()}
every_law = pytest.mark.parametrize("law", list(LAWS))
TIMES = [0.9, 0.6, 0.35, 0.0]


def gaussian() -> oracles.Gaussian:
    return oracles.Gaussian(torch.tensor([0.6, -0.3]), torch.tensor([[1.2, 0.4], [0.4, 0.3]], dtype=torch.float64))


class Says(Denoiser):
    """A student that says the x0 and eps of ``rule(x, t, ctx)``."""

    def __init__(self, process: Any, rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.process, self.rule = process, rule
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        c, (x0, noise) = self.process.coef(t), self.rule(x, t, ctx)
        return Posterior(linear(-c.sigma, x0, c.alpha, noise) + 0 * self.weight, "v", x, c)


def flow_map(process: Any, noise: Callable[[Tensor, Any], Tensor] | None = None) -> Says:
    """The consistency function of the Gaussian: where its probability flow ends."""

    def rule(x: Tensor, t: Any, ctx: Context) -> tuple[Tensor, Tensor]:
        c, last = process.coef(t), process.coef(0.0)
        x0 = torch.cat(
            [
                gaussian().transport(row[None], process.coef(float(time)), last)
                for row, time in zip(x, torch.as_tensor(t).expand(len(x)), strict=True)
            ]
        )
        return x0, linear(1 / c.sigma, x, -c.alpha / c.sigma, x0)

    return Says(process, rule)


def data(n: int = 64, seed: int = 0) -> dict[str, Tensor]:
    return {"x": gaussian().sample(n, seed=seed)}


def context(n: int = 64, seed: int = 1) -> Context:
    return Context.of(n, seed, dtype=torch.float64)


@every_law
@given(t=st.floats(0.05, 1.0), share=st.floats(0.0, 0.95), seed=st.integers(0, 99))
def test_the_matched_pair_passes_through_both_ends(law: str, t: float, share: float, seed: int) -> None:
    process, s = LAWS[law], t * share
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x0, noise = matched(process, x, t, y, s)
    for time, state in ((t, x), (s, y)):
        c = process.coef(time)
        size = abs(c.alpha) * x0.abs() + c.sigma * noise.abs() + 1
        assert ((c.alpha * x0 + c.sigma * noise - state) / size).abs().max() < 1e-9
    a, b = process.coef(t), process.coef(s)
    if a.alpha > 0.05:  # the form in which Rectified Diffusion writes it
        published = (y / b.alpha - x / a.alpha) / (b.sigma / b.alpha - a.sigma / a.alpha)
        torch.testing.assert_close(noise, published, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("read", ["end", "native", "x0"])
@pytest.mark.parametrize("inside", [0.0, 1.0])
@pytest.mark.parametrize("law", ["vp", "flow", "cosine"])
def test_a_student_that_takes_the_teachers_two_steps_in_one_has_no_loss(law: str, inside: float, read: str) -> None:
    """Progressive distillation (at the start of segments), and phases (inside them) where the move is read off the line."""
    process, teacher = LAWS[law], gaussian().denoiser(LAWS[law])
    pairs: dict[str, Any] = {}

    def rule(x: Tensor, t: Any, ctx: Context) -> tuple[Tensor, Tensor]:
        return pairs["x0"], pairs["noise"]

    student = Says(process, rule)
    objective = Segments(student, TIMES, teacher, substeps=2, inside=inside, read=read, metric="huber")
    keep = objective._ends

    def ends(batch: Any, segment: Tensor, start: Tensor, end: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        x, y = keep(batch, segment, start, end, ctx)
        pairs["x0"], pairs["noise"] = matched(process, x, start, y, end)
        again = moved(teacher, solvers.get("ddim"), x, start, end, 2, ctx)
        torch.testing.assert_close(again, y)
        return x, y

    objective._ends = ends  # type: ignore[method-assign]
    assert objective(data(), context()).total < 1e-12


def test_progressive_distillation_of_a_gaussian_learns_the_teachers_two_steps() -> None:
    """A student affine in x, one map a time, is the exact class: its one step becomes the teacher's two."""
    process, teacher = Flow(), gaussian().denoiser(Flow())

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleDict({k: nn.Linear(2, 2).double() for k in ("90", "50")})

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            first = (label > 0.7)[:, None]
            return torch.where(first, self.maps["90"](x), self.maps["50"](x))

    torch.manual_seed(0)
    student = parametrized(Affine(), process, "flow")
    objective = Segments(student, [0.9, 0.5, 0.1], teacher, substeps=2, read="native")
    batches = Batches(Arrays({"x": gaussian().sample(4096, seed=3)}), 512, prefetch=False)

    def lbfgs(player: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.99))

    learnt: Any = Trainer(
        objective, batches, steps=250, decay="cosine", optimizer=lbfgs, ema=0, cpu=True, progress=False
    ).fit()
    x = linear(0.1, gaussian().sample(64, seed=9), 0.9, torch.randn(64, 2, dtype=torch.float64))
    one = sample(learnt["student"], solvers.get("ddim"), grids.fixed([0.9, 0.5, 0.1]), 2, x=x, start=0.9, stop=0.1)
    two = sample(teacher, solvers.get("ddim"), grids.fixed([0.9, 0.7, 0.5, 0.3, 0.1]), 4, x=x, start=0.9, stop=0.1)
    assert (one - two).abs().max() < 2e-3


@pytest.mark.parametrize("law", ["vp", "flow"])
def test_a_consistency_function_has_no_distillation_loss(law: str) -> None:
    process, teacher = LAWS[law], gaussian().denoiser(LAWS[law])
    times = [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]

    def loss(substeps: int) -> float:
        objective = Consistency(
            flow_map(process),
            times,
            teacher,
            solver="dpm-solver++2s(rule='exact', variable='angle')",
            substeps=substeps,
            metric="l2",
        )
        return float(objective(data(24), context(24)).total.detach())

    assert loss(16) < 1e-4 and loss(32) < loss(16) / 8


def test_consistency_training_knows_a_single_point() -> None:
    """Without a teacher both ends share data and noise: for one point of data the flow map is that point."""
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    student = Says(
        VP(),
        lambda x, t, ctx: (point.expand_as(x), (x - VP().coef(t).alpha[:, None] * point) / VP().coef(t).sigma[:, None]),
    )
    objective = Consistency(student, [0.9, 0.5, 0.2, 0.0], metric="l2")
    assert objective({"x": point.expand(32, 2)}, context(32)).total < 1e-20


def test_subpaths_at_their_noisy_end_are_consistency_distillation() -> None:
    """gamma = 1 on the line is x_t with its own noise level."""
    objective = Consistency(flow_map(VP()), [0.9, 0.5, 0.0], gaussian().denoiser(VP()), gamma="uniform")
    x, y = torch.randn(2, 6, 2, dtype=torch.float64)
    t, s = torch.full((6,), 0.9).double(), torch.full((6,), 0.5).double()
    line, sigma = objective._line(x, y, t, s, torch.ones(6))
    torch.testing.assert_close(line, x)
    torch.testing.assert_close(sigma, VP().coef(t).sigma)
    low, sigma = objective._line(x, y, t, s, torch.zeros(6))
    ratio = VP().coef(0.9).alpha / VP().coef(0.5).alpha
    torch.testing.assert_close(low, ratio * y)
    torch.testing.assert_close(sigma, ratio * VP().coef(s).sigma)


@pytest.mark.parametrize("law", ["vp", "flow", "cosine"])
def test_a_state_along_a_subpath_is_asked_at_the_time_of_its_noise(law: str) -> None:
    """x0 and eps of the line are those of the state alpha_u / alpha_t times as large at u, so any belief reads alike."""
    process = LAWS[law]
    objective = Consistency(flow_map(process), [0.9, 0.5, 0.0], gaussian().denoiser(process), gamma="uniform")
    x0, noise = torch.randn(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = torch.full((6,), 0.9).double(), torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0, 0.0]).double()
    x, y = (process.corrupt(x0, v, context(6), noise=noise)[0] for v in (t, s))
    share = torch.tensor([0.0, 0.4, 1.0]).double().repeat(2)
    state, u = objective._along(x, y, t, s, share)
    torch.testing.assert_close(state, process.corrupt(x0, u, context(6), noise=noise)[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(u[[0, 2, 3, 5]], torch.tensor([0.5, 0.9, 0.0, 0.9]).double())
    line, sigma = objective._line(x, y, t, s, share)
    torch.testing.assert_close(linear(process.coef(t).alpha, x0, sigma, noise), line, atol=1e-9, rtol=1e-9)


def test_a_consistency_function_has_no_loss_along_subpaths_either() -> None:
    """The line is the trajectory but for its curvature, so the loss falls with the length of the sub-path."""

    def loss(n: int) -> float:
        times = [0.8 * (1 - k / n) for k in range(n + 1)]
        objective = Consistency(
            flow_map(VP()), times, gaussian().denoiser(VP()), gamma="uniform", substeps=4, metric="l2"
        )
        return float(objective(data(24), context(24)).total.detach())

    assert loss(32) < loss(8) / 16 and loss(32) < 1e-5


@pytest.mark.parametrize("form", ["x0", "lcm", "karras"])
def test_at_its_noisy_end_a_subpath_asks_as_consistency_distillation_does(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gamma = 1 for every item gives the loss of gamma = 1, in every boundary form."""
    from sfumato.objectives.distill import consistency

    def made(gamma: Any) -> Consistency:
        return Consistency(small(process=VP()), [0.9, 0.5, 0.0], small(1, VP()), gamma=gamma, boundary=form)

    objective = made("uniform")
    monkeypatch.setattr(objective, "_told", lambda cond, share, like: cond)
    monkeypatch.setattr(consistency, "unit", lambda rng, **more: torch.ones(16, dtype=torch.float64))
    batch = {"x": states()["x"][:16]}
    torch.testing.assert_close(
        objective(batch, Context.of(16, 3)).total, made(1.0)(batch, Context.of(16, 3)).total, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("weighting", "power"), [("uniform", 0), ("sigma", 1), ("variance", 2)])
def test_clean_times_count_as_much_as_noisy_ones_in_what_the_network_says(weighting: str, power: int) -> None:
    """An error of v moves x0 by sigma times as much: |x0 - x0'| / sigma = |v - v'|. The mean over the times is 1."""
    times = [0.9, 0.6, 0.3, 0.1, 0.0]
    objective = Consistency(small(process=VP()), times, small(1, VP()), weighting=weighting)
    t = torch.tensor(times[:-1]).double()
    weights = objective._weight(t)
    torch.testing.assert_close(weights.mean(), torch.ones((), dtype=torch.float64))
    scaled = weights * VP().coef(t).sigma ** power
    torch.testing.assert_close(scaled, scaled[:1].expand(4))
    torch.testing.assert_close(objective._weight(t[:2]), weights[:2])
    with pytest.raises(InputError, match="weighting"):
        Consistency(small(), times, weighting="snr-ish")


def test_the_average_of_an_adapted_student_holds_the_adapters_only() -> None:
    """What is frozen is shared; the adapters' average moves, and without a teacher there is none."""
    student = lora.inject(small(), 2)
    objective = Consistency(student, [1.0, 0.5, 0.0], small(1), target=0.5)
    assert (
        Consistency(small(), [1.0, 0.0], small(1)).target == 0.95 and Consistency(small(), [1.0, 0.0]).average is None
    )
    for p, q in zip(objective.average.parameters(), student.parameters(), strict=True):  # type: ignore[union-attr]
        assert (p is q) == (not q.requires_grad) and not p.requires_grad
        if q.requires_grad:
            q.data.add_(1.0)
    before = copy.deepcopy(objective.average).state_dict()  # type: ignore[union-attr]
    objective.after_step(0)
    for (name, p), q in zip(objective.average.named_parameters(), student.parameters(), strict=True):  # type: ignore[union-attr]
        wanted = 0.5 * (before[name] + q) if q.requires_grad else before[name]
        torch.testing.assert_close(p.detach(), wanted.detach())


@pytest.mark.parametrize("predicts", ["x0", "v", "eps", "edm"])
def test_a_bootstrapped_student_is_asked_as_at_time_one(predicts: str) -> None:
    """Its input and the meaning of its answer are those of its one call when sampling; only the label says 1 - t."""
    process, seen = VP(), []

    class Blind(Net):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            seen.append(label)
            return super().forward(x, torch.zeros_like(label))

    student = parametrized(Blind(), process, predicts)
    objective = Bootstrap(student, gaussian().denoiser(process), (2,))
    noise, ctx = torch.randn(5, 2), Context.of(5)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).double()
    said = objective.says(noise, t, ctx)
    x = process.coef(1.0).sigma * noise
    torch.testing.assert_close(said, student(x, torch.ones(5).double(), ctx).mean)
    torch.testing.assert_close(seen[0].double(), 1 - t)
    once = sample(student, solvers.get("ddim"), grids.get("uniform"), 1, x=x)
    torch.testing.assert_close(objective.says(noise, torch.zeros(5).double(), ctx), once, rtol=1e-4, atol=1e-4)


def test_the_boundary_of_some_items_is_that_of_all_on_average_and_of_any_split() -> None:
    from sfumato.core import Streams

    teacher, n = gaussian().denoiser(VP()), 400
    some, every = (Bootstrap(small(process=VP()), teacher, (2,), share=share) for share in (0.25, 1.0))
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))

    def edge(objective: Bootstrap, part: slice) -> Tensor:
        rows = noise[part]
        return objective._edge(rows, Context(cond={}, batch=len(rows), rng=Streams.of(3, n).select(part))).detach()

    whole = edge(some, slice(0, n))
    torch.testing.assert_close((edge(some, slice(0, 150)) * 150 + edge(some, slice(150, n)) * 250) / n, whole)
    top = torch.ones(n).double()
    all_of_them = (
        (every.says(noise, top, Context.of(n)) - teacher(noise * VP().coef(1.0).sigma, top, Context.of(n)).mean)
        .square()
        .mean()
    )
    torch.testing.assert_close(edge(every, slice(0, n)), all_of_them.detach())
    assert abs(float(whole / all_of_them.detach()) - 1) < 0.15
    with pytest.raises(InputError, match="share"):
        Bootstrap(small(), small(1), (2,), share=0.0)


@pytest.mark.parametrize("form", ["x0", "lcm", "karras"])
def test_boundary_forms_return_the_state_at_the_last_time(form: str) -> None:
    """Whatever the network says there; 'karras' also where sigma is not yet 0."""
    process = EDM()
    last = process.coef(0.05).sigma if form == "karras" else 0.0
    t = 0.05 if form == "karras" else 0.0
    a, b = boundary(form, process.coef(t), t, last=last) if form == "karras" else boundary(form, process.coef(t), t)
    x = torch.randn(4, 2)
    wild = Posterior(x if form == "x0" else 100 * torch.randn(4, 2), "x0", x, process.coef(t))
    torch.testing.assert_close(a * x + b * wild.mean, x)
    if form == "karras":  # the preconditioning of Karras et al. with sigma - last for sigma
        c, d = process.coef(0.6), 0.5
        raw = torch.randn(4, 2)
        edm = parametrized(Net(), process, "edm")
        post = replace(edm(x, 0.6, Context.of(4)), native=raw)
        rho = c.sigma
        published = d**2 / ((rho - last) ** 2 + d**2) * x + (rho - last) * d / (rho**2 + d**2) ** 0.5 * raw
        torch.testing.assert_close(consistent(post, 0.6, "karras", last=last), published)


def test_the_sampler_keeps_the_law_of_a_consistency_function() -> None:
    student = flow_map(VP())
    start = gaussian().sample(400, seed=1) * VP().coef(1.0).alpha + VP().coef(1.0).sigma * torch.randn(400, 2).double()
    x = sample(student, solvers.get("consistency"), grids.get("uniform"), 3, x=start, seed=3)
    assert (x.mean(0) - gaussian().mean).abs().max() < 0.2
    assert (torch.cov(x.T) - torch.cov(gaussian().sample(4000, seed=5).T)).abs().max() < 0.25
    once = sample(student, solvers.get("consistency"), grids.get("uniform"), 1, x=start, seed=3)
    torch.testing.assert_close(once, gaussian().transport(start, VP().coef(1.0), VP().coef(0.0)), atol=1e-9, rtol=1e-9)


def test_distribution_matching_rests_where_critic_and_teacher_agree() -> None:
    teacher = gaussian().denoiser(Flow())
    net = small()
    rest = DistributionMatching(net, teacher, gaussian().denoiser(Flow()), shape=(2,))
    assert rest({}, Context.of(32, 0), "student").terms["matching"] < 1e-10
    other = oracles.Gaussian(gaussian().mean + 1, torch.eye(2).double()).denoiser(Flow())
    away = DistributionMatching(net, teacher, other, shape=(2,))
    loss = away({}, Context.of(32, 0), "student")
    loss.total.backward()
    assert loss.terms["matching"] > 0.1 and any(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


class Net(nn.Module):
    """A small network of (x, label), and of a scalar that it may be told."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([x, label[:, None].to(x)], 1))


def small(seed: int = 0, process: Any = None) -> Any:
    return parametrized(Net(seed), process or Flow(), "flow")


class Critic(nn.Module):
    """Of pairs in the plane."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(9)
            self.body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, low: Tensor, high: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([low, high, label[:, None]], 1))


class WithLatent(Net):
    """A network that is also told a latent."""

    draws = {"latent": (2,)}

    def forward(self, x: Tensor, label: Tensor, *, latent: Tensor) -> Tensor:
        return super().forward(x + latent, label)


def small_features() -> nn.Module:
    layer = nn.Linear(2, 8)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(layer.bias)
    return layer


def states(n: int = 48) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"states": torch.randn(n, 2, 2, generator=generator), "x": torch.randn(n, 2, generator=generator)}


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "segments": lambda: Segments(small(), [1.0, 0.0], inside=0.5),
    "progressive": lambda: Segments(small(), [1.0, 0.5, 0.0], small(1), read="native", weighting="max-snr"),
    "consistency": lambda: Consistency(small(), [1.0, 0.6, 0.3, 0.0], small(1), target=0.9),
    "phased": lambda: Consistency(small(), [1.0, 0.8, 0.6, 0.3, 0.0], small(1), phases=2),
    "training": lambda: Consistency(small(), [1.0, 0.6, 0.0]),
    "matching": lambda: DistributionMatching(small(), small(1), small(2), pairs=1.0, ratio=2),
    "matching-2": lambda: DistributionMatching(small(), small(1), small(2), [1.0, 0.5, 0.0], shape=(2,)),
    "unrolled": lambda: Unrolled(small(), [1.0, 0.5, 0.2, 0.0], last=2),
    "bootstrap": lambda: Bootstrap(small(), small(1), (2,)),
    "annealing": lambda: AnnealingReflow(small(), warmup=5),
    "guided": lambda: FlowGuided(small(), small()),
    "adversarial": lambda: DenoisingGAN(
        parametrized(WithLatent(), VP(), "x0"), Critic(), [1.0, 0.5, 0.001], lazy=2, regress=0.1
    ),
    "mmd": lambda: SamplerMMD(small(), small_features(), steps=2),
    "time-aware": lambda: TimeAware(small(), small(1), steps=2),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_stopped_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    def trainer(steps: int, out: Path) -> Trainer:
        fields = states()
        kept = (
            {"x": fields["x"]}
            if name in ("progressive", "consistency", "phased", "training", "mmd", "adversarial", "time-aware")
            else fields
        )
        batches = Batches(Arrays(kept), 16, prefetch=False)
        return Trainer(OBJECTIVES[name](), batches, steps=steps, out=out, ema=0.9, lr=1e-2, cpu=True, progress=False)

    whole = trainer(6, tmp_path / "whole").fit()
    trainer(3, tmp_path / "parts").fit()
    parts = trainer(6, tmp_path / "parts").fit()
    for player in whole:
        before = dict(OBJECTIVES[name]().players()[player].named_parameters())
        for key, value in whole[player].named_parameters():
            assert torch.equal(value, dict(parts[player].named_parameters())[key])
        assert any(not torch.equal(v, before[k]) for k, v in whole[player].named_parameters())


def test_teachers_are_not_saved_and_do_not_move() -> None:
    teacher = small(1)
    before = copy.deepcopy(teacher.state_dict())
    objective = Consistency(small(), [1.0, 0.5, 0.0], teacher)
    assert not any("teacher" in k for k in objective.state_dict())
    Trainer(
        objective, Batches(Arrays({"x": states()["x"]}), 16, prefetch=False), steps=3, lr=0.1, cpu=True, progress=False
    ).fit()
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())


def test_annealing_reflow_is_flow_matching_at_one_and_reflow_at_zero() -> None:
    batch, ctx = states(32), Context.of(32, 4)
    reflow = Segments(small(), [1.0, 0.0], inside=1.0, read="native")
    still = AnnealingReflow(small(), schedule="constant", level=0.0)
    x, y = still._ends(batch, torch.zeros(32, dtype=torch.long), torch.ones(32), torch.zeros(32), ctx)
    assert torch.equal(x, batch["states"][:32, 0]) and torch.equal(y, batch["states"][:32, 1])
    assert type(reflow)._ends is Segments._ends
    fresh = AnnealingReflow(small(), schedule="constant", level=1.0)
    x, _ = fresh._ends(batch, torch.zeros(32, dtype=torch.long), torch.ones(32), torch.zeros(32), Context.of(32, 4))
    assert torch.equal(x, Context.of(32, 4).rng.normal(x))  # type: ignore[union-attr]


def test_the_bootstrapped_trajectory_of_a_gaussian() -> None:
    """The exact signal of the trajectory has a loss of order delta^4: one DDIM step errs by delta^2."""
    process, g = VP(), gaussian()

    class Signal(Bootstrap):
        def says(self, noise: Tensor, t: Tensor, ctx: Context) -> Tensor:
            top, rows = process.coef(1.0), []
            for e, time in zip(noise.double(), t.tolist(), strict=True):
                c = process.coef(time)
                rows.append((g.transport(top.sigma * e[None], top, c) - c.sigma * e) / c.alpha)
            return torch.cat(rows) + 0 * next(self.student.parameters()).double().sum()

    def loss(delta: float) -> float:
        return float(
            Signal(small(process=process), g.denoiser(process), (2,), delta=delta, boundary=0.0)(
                {}, context(24)
            ).total.detach()
        )

    coarse, fine = loss(0.04), loss(0.02)
    assert fine < coarse / 8 and fine < 1e-4


def test_the_discrepancy_is_the_sum_over_pairs() -> None:
    x, y = torch.randn(5, 3), torch.randn(7, 3)
    for kernel, k in {
        "cubic": lambda a, b: (float(a @ b) / 3 + 1) ** 3,
        "gaussian": lambda a, b: float((-(a - b).square().sum() / 3).exp()),
    }.items():
        among = [
            sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
            for z in (x.double(), y.double())
        ]
        between = sum(k(a, b) for a in x.double() for b in y.double()) / 35
        assert abs(float(squared_mmd(x, y, kernel)) - (sum(among) - 2 * between)) < 1e-9
    with pytest.raises(InputError, match="two items"):
        squared_mmd(x[:1], y)


def test_stored_trajectories_are_the_teachers_sampling_whatever_the_batch(tmp_path: Path) -> None:
    teacher, grid = small(3), grids.get("uniform")
    made = Trajectories(teacher, 10, (2,), solver="arc", grid="uniform", steps=5, seed=7)
    whole = sample(teacher, solvers.get("arc"), grid, 5, shape=(10, 2), seed=7)
    torch.testing.assert_close(made.batch(range(10))["states"][:, -1], whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.batch([6])["states"][0], made.batch([6])["states"][0])
    torch.testing.assert_close(made.batch([8, 3])["states"][1], made.batch([3])["states"][0], rtol=1e-5, atol=1e-6)
    made.write(tmp_path / "a", per_shard=4, batch=3)
    Trajectories(teacher, 4, (2,), solver="arc", grid="uniform", steps=5, seed=7, first=10).write(tmp_path / "b")
    kept = Stored(tmp_path / "a", tmp_path / "b", conditions=lambda rows: {"row": torch.tensor(rows)})
    assert len(kept) == 14 and kept.times == grid(Flow(), 5, 1.0, 0.0).tolist()
    part = kept.batch([12, 2])
    assert part["cond"]["row"].tolist() == [12, 2]
    longer = Trajectories(teacher, 14, (2,), solver="arc", grid="uniform", steps=5, seed=7).batch([12, 2])
    torch.testing.assert_close(part["states"], longer["states"], rtol=1e-5, atol=1e-6)
    ends = Stored(tmp_path / "a", tmp_path / "b", times=(1.0, 0.0)).batch([12, 2])
    assert "cond" not in ends and torch.equal(ends["states"], part["states"][:, [0, -1]])
    with pytest.raises(InputError, match="wanted of every folder"):
        Stored(tmp_path / "a", times=(1.0, 0.123))
    pairs = Trajectories(teacher, 3, (2,), solver="arc", steps=5, keep="ends", seed=7).batch(range(3))["states"]
    assert torch.equal(pairs[:, 0], made.batch(range(3))["states"][:, 0])


def test_stochastic_solvers_have_no_pairs() -> None:
    with pytest.raises(InputError, match="draws noise"):
        Trajectories(small(), 2, (2,), solver="ddpm")
    for refused in (
        lambda: Segments(small(), [1.0, 0.0], small(1), solver="ddpm"),
        lambda: Consistency(small(), [1.0, 0.0], small(1), solver="ddpm"),
        lambda: SamplerMMD(small(), nn.Linear(2, 2), solver="ddpm"),
    ):
        with pytest.raises(InputError):
            refused()


def test_students_that_say_nothing_at_a_time_are_refused() -> None:
    blind = parametrized(Net(), Flow(), "eps")
    with pytest.raises(InputError, match="predicts 'eps'"):
        Segments(blind, [1.0, 0.0])
    Segments(blind, [0.9, 0.0])
    with pytest.raises(InputError, match="falling"):
        Segments(small(), [0.0, 1.0])


def test_a_further_scalar_has_no_effect_until_trained_and_folds_away() -> None:
    from sfumato.networks import DiT

    torch.manual_seed(0)
    net = DiT(1, size=4, patch=2, width=32, depth=1, heads=2)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    wider = with_scalars(net, {"gamma": 1.0})
    x, label = torch.randn(3, 1, 4, 4), torch.tensor([0.2, 0.5, 1.0])
    assert torch.equal(wider(x, label, gamma=torch.rand(3)), net(x, label))
    nn.init.normal_(wider.conditioning.scalars["gamma"].second.weight)
    plain = settled(wider, "gamma", 1.0)
    assert plain.config == net.config
    torch.testing.assert_close(plain(x, label), wider(x, label, gamma=torch.ones(3)))
    with pytest.raises(InputError, match="reads no scalar"):
        settled(net, "gamma", 1.0)


def test_generated_pairs_of_a_perfect_generator_follow_the_law_of_real_ones() -> None:
    """Where x0' is a draw of q(x0 | x_t), the pair (x_s, x_t) has the covariance of the process's own pair."""
    process, g, n = VP(), gaussian(), 20000
    seen: dict[str, Tensor] = {}

    class Draws(Denoiser):
        def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
            c = self.process.coef(t)
            a, s = float(c.alpha[0]), float(c.sigma[0])
            total = a**2 * torch.cov(g.sample(200_000, seed=0).T) + s**2 * torch.eye(2).double()
            cov = torch.cov(g.sample(200_000, seed=0).T)
            gain = a * cov @ torch.linalg.inv(total)
            mean = g.mean + (x - a * g.mean) @ gain.T
            rest = torch.linalg.cholesky(cov - a * gain @ cov)
            return Posterior(mean + ctx.rng.normal(x) @ rest.T, "x0", x, c)  # type: ignore[union-attr]

    generator = Draws()
    generator.process = process

    class Watch(nn.Module):
        def forward(self, low: Tensor, high: Tensor, label: Tensor) -> Tensor:
            seen["real" if "real" not in seen else "made"] = torch.cat([low, high], 1).detach()
            return low.sum(1)

    objective = DenoisingGAN(generator, Watch(), [0.8, 0.3], r1=0.0)
    objective({"x": g.sample(n, seed=4)}, Context.of(n, 5, dtype=torch.float64), "critic")
    gap = torch.cov(seen["real"].T) - torch.cov(seen["made"].T)
    assert gap.abs().max() < 0.04 and (seen["real"].mean(0) - seen["made"].mean(0)).abs().max() < 0.04


def test_looks_are_a_further_distance_of_what_is_clean() -> None:
    class Unlike(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a.sum(1) - b.sum(1)).square()

    batch = states(16)
    plain, seen = (Segments(small(), [1.0, 0.0], read="x0", looks=looks, seen=3.0) for looks in (None, Unlike()))
    a, b = (o({"states": batch["states"]}, Context.of(16, 1)) for o in (plain, seen))
    torch.testing.assert_close(b.total, a.total + 3.0 * b.terms["looks"])
    x0 = small()(batch["states"][:, 0], torch.ones(16).double(), Context.of(16)).mean
    torch.testing.assert_close(b.terms["looks"], (x0.sum(1) - batch["states"][:, 1].sum(1)).square().mean())


def test_a_run_is_unrolled_as_it_is_sampled() -> None:
    times, batch = [1.0, 0.5, 0.2, 0.0], states(8)["states"]
    whole = Unrolled(small(), times)
    wanted = sample(small(), solvers.get("ddim"), grids.fixed(times), 3, x=batch[:, 0])
    torch.testing.assert_close(whole.sampled(batch[:, 0], Context.of(8)).detach(), wanted)
    assert Unrolled(small(), times)({"states": torch.stack([batch[:, 0], wanted], 1)}, Context.of(8)).total < 1e-12
    short = Unrolled(small(), times, last=1)
    for objective in (whole, short):
        objective({"states": batch}, Context.of(8)).total.backward()
    grads = [torch.cat([p.grad.flatten() for p in o.student.parameters()]) for o in (whole, short)]
    assert not torch.allclose(*grads)
