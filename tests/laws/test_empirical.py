"""DPM-Solver-v3: named special cases, the published algorithm written out, and its pseudo derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sweep import PROCESSES, lam_times, mixture, start, three_processes
from torch import Tensor

from sfumato import grids, oracles
from sfumato.core import Context, sample, trajectory
from sfumato.solvers.empirical import DPMSolverV3, EmpiricalStatistics
from sfumato.solvers.exponential import Multistep
from sfumato.solvers.scheduled import Move, Scheduled


@three_processes
def test_statistics_of_minus_one_are_the_noise_form(law: str) -> None:
    """Up to the last step, where a DDIM step in any split keeps x0."""
    process = PROCESSES[law]
    denoiser, x = mixture().denoiser(process), start(mixture(), process, 16, 0.9)
    for order, corrector in ((1, "none"), (3, "none"), (2, "exact")):
        ours = DPMSolverV3(EmpiricalStatistics.constant(0.0, -1.0, 0.0), order, corrector)
        ends = [
            sample(denoiser, solver, grids.get("logsnr"), 10, x=x, start=0.9, stop=0.1)
            for solver in (ours, Multistep(order, "noise", corrector=corrector == "exact"))
        ]
        assert torch.allclose(*ends, rtol=1e-9, atol=1e-10)


def test_statistics_are_integrated_where_they_vary() -> None:
    """A linear field f = s f + b is solved exactly by order 1 with its own statistics: df/dlambda = s f + b."""
    lams = torch.linspace(-3, 3, 61, dtype=torch.float64)
    l, s, b = 0.3 + 0.1 * lams, -0.4 + 0.05 * lams, 0.2 - 0.1 * lams  # noqa: E741
    statistics = EmpiricalStatistics(lams, l, s, b)
    _, big_l, big_s, big_b = statistics.at(1.05)
    grid = torch.linspace(-3, 1.05, 200_001, dtype=torch.float64)

    def path(v: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(v, grid)])

    s_path = path(-0.4 + 0.05 * grid)
    assert float(big_l) == pytest.approx(float(path(0.3 + 0.1 * grid)[-1]), rel=1e-8)
    assert float(big_s) == pytest.approx(float(s_path[-1]), rel=1e-8)
    assert float(big_b) == pytest.approx(float(path((-s_path).exp() * (0.2 - 0.1 * grid))[-1]), rel=1e-3)


def published_v3(process: Any, x: Tensor, times: list[float], order: int, corrector: str, pseudo: bool) -> Tensor:
    """DPM-Solver-v3 as written: g relative to the step's start, derivatives of it, integrals tabulated by trapezoids."""
    denoiser, table = mixture().denoiser(process), torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    lams = [process.coef(t).lam for t in times]
    l, s, b = measured_l(table), measured_s(table), measured_b(table)  # noqa: E741

    def path(v: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(v, table)])

    big_l, big_s = path(l), path(s)
    big_b = path((-big_s).exp() * b)

    def index(lam: float) -> int:
        return round((lam + 4) * 10_000)

    def moved(y: Tensor, start: int, end: int, nodes: list[int], values: list[Tensor], pseudo: bool) -> Tensor:
        i, j = index(lams[start]), index(lams[end])
        g = [
            (big_s[i] - big_s[index(lams[k])]).exp() * f - big_s[i].exp() * (big_b[index(lams[k])] - big_b[i])
            for k, f in zip(nodes, values, strict=True)
        ]
        u, kernel = table[i : j + 1] - lams[start], (big_l + big_s)[i : j + 1].sub(big_l[i] + big_s[i]).exp()
        mean = big_s[i].exp() * (big_b[i : j + 1] - big_b[i])  # what g = 0 would give f on its way
        out = y - torch.trapezoid(kernel * (g[0][..., None] + mean), u)
        gaps = torch.tensor([lams[k] - lams[start] for k in nodes], dtype=torch.float64)
        n = len(nodes) - 1
        if pseudo:
            rows, table_of = list(g), [list(g)]
            for order_of in range(1, n + 1):
                rows = [(rows[m] - rows[m + 1]) / (gaps[m] - gaps[m + order_of]) for m in range(len(rows) - 1)]
                table_of.append(rows)
            slopes = [table_of[k][0] * math.factorial(k) for k in range(1, n + 1)]
        else:
            system = torch.stack([gaps[1:] ** k / math.factorial(k) for k in range(1, n + 1)], 1) if n else None
            slopes = (
                list(torch.linalg.solve(system, torch.stack([v - g[0] for v in g[1:]]).flatten(1)).view(n, *x.shape))
                if n
                else []
            )
        for k, slope in enumerate(slopes, 1):
            out = out - torch.trapezoid(kernel * u**k / math.factorial(k), u) * slope
        return (big_l[i] - big_l[j]).exp() * out

    ys, fs, used = [x / process.coef(times[0]).alpha], [], 0
    for k in range(len(times) - 1):
        c = process.coef(times[k])
        eps = denoiser(ys[k] * c.alpha, times[k], Context.of(len(x), None)).view("eps")
        fs.append((c.sigma * eps - measured_l(torch.tensor(c.lam)) * ys[k] * c.alpha) / c.alpha)
        count = {"none": 0, "same": used, "exact": used + 1, "pseudo": used + 1}[corrector]
        if k and count > 1:
            nodes = [k - 1, k, *range(k - 2, k - count, -1)][:count]
            ys[k] = moved(ys[k - 1], k - 1, k, nodes, [fs[m] for m in nodes], corrector == "pseudo")
        used = min(k + 1, order, len(times) - 1 - k)
        nodes = list(range(k, k - used, -1))
        ys.append(moved(ys[k], k, k + 1, nodes, [fs[m] for m in nodes], pseudo))
    return ys[-1] * process.coef(times[-1]).alpha


def measured_l(lam: Tensor) -> Tensor:
    return 0.6 - 0.1 * lam


def measured_s(lam: Tensor) -> Tensor:
    return -0.4 + 0.05 * lam


def measured_b(lam: Tensor) -> Tensor:
    return 0.2 - 0.1 * lam


@pytest.mark.parametrize("law", ["vp", "edm"])
@pytest.mark.parametrize(("order", "corrector", "pseudo"), [
    (1, "exact", False), (2, "same", False), (2, "pseudo", True), (3, "same", True), (3, "exact", False), (3, "pseudo", False),
    (3, "pseudo", True), (4, "same", True),
])  # fmt: skip
def test_v3_is_the_published_algorithm(law: str, order: int, corrector: str, pseudo: bool) -> None:
    """Predictor, corrector and pseudo derivatives with statistics that vary, against the formulas of the paper."""
    process, lams = PROCESSES[law], torch.linspace(-4, 4, 8001, dtype=torch.float64)
    statistics = EmpiricalStatistics(lams, measured_l(lams), measured_s(lams), measured_b(lams))
    times = [process.time(lam) for lam in (-1.6, -0.9, -0.1, 0.3, 1.1, 1.9, 2.4)]
    x = start(mixture(), process, 8, times[0])
    solver = DPMSolverV3(statistics, order, corrector, pseudo, taper=True)
    ours = sample(mixture().denoiser(process), solver, grids.fixed(times), 6, x=x, start=times[0], stop=times[-1])
    assert torch.allclose(ours, published_v3(process, x, times, order, corrector, pseudo), rtol=1e-5, atol=1e-6)


@three_processes
def test_pseudo_derivatives_of_two_beliefs_are_exact_and_of_three_have_order_2(law: str) -> None:
    """With two nodes nothing is left out; with three the slope hears only of two, which leaves order 2."""
    process = PROCESSES[law]
    t, s = process.time(-1.5), process.time(1.5)
    denoiser, x = mixture().denoiser(process), start(mixture(), process, 64, t)

    def ends(solver: Any, steps: int) -> Tensor:
        return sample(denoiser, solver, grids.get("logsnr"), steps, x=x, start=t, stop=s) / process.coef(s).alpha

    for order, equal in ((2, True), (3, False)):
        both = (ends(DPMSolverV3(None, order, pseudo=pseudo), 9) for pseudo in (False, True))
        assert torch.allclose(*both, rtol=1e-9, atol=1e-10) is equal
    fine = ends(Multistep(4), 800)
    for pseudo, order in (
        (True, 2),
        (False, 3),
    ):  # the first interval split: a start of order 1 would hide the difference
        errors = []
        for n in (48, 96):
            times = lam_times(process, n, 1.5, -1.5, lead=9)
            y = sample(denoiser, DPMSolverV3(None, 3, pseudo=pseudo), grids.fixed(times), len(times) - 1, x=x,
                       start=float(times[0]), stop=float(times[-1]))  # fmt: skip
            errors.append((y / process.coef(float(times[-1])).alpha - fine).norm(dim=1))
        assert abs(float(torch.log2(errors[0] / errors[1]).median()) - order) < 0.3


@three_processes
def test_what_pseudo_derivatives_lose_in_a_step_is_h_u_times_the_second_divided_difference(law: str) -> None:
    """The third step is the first that differs: by -int kernel h u g[0, 1, 2] du, so halving h leaves an eighth."""
    process = PROCESSES[law]
    t, gaps = process.time(-0.7), []
    denoiser, x = mixture().denoiser(process), start(mixture(), process, 64, t)
    for h in (0.02, 0.01):
        times = [process.time(-0.7 + h * i) for i in range(4)]
        options = {"x": x, "start": times[0], "stop": times[-1]}
        ends = [
            sample(denoiser, DPMSolverV3(None, 3, pseudo=p), grids.fixed(times), 3, **options) for p in (False, True)
        ]
        run = trajectory(denoiser, DPMSolverV3(None, 3), grids.fixed(times), 3, **options)
        g = [f for _, f in list(run)[-1].carry[0]]  # plain statistics: g is f, newest first
        second = (g[0] - 2 * g[1] + g[2]) / (2 * h * h)
        u = torch.linspace(0, h, 2001, dtype=torch.float64)
        moment = float(torch.trapezoid((u - h).exp() * h * u, u))  # L_u - L_h = u - h
        exact, pseudo = (e / process.coef(times[-1]).alpha for e in ends)
        assert torch.allclose(pseudo - exact, moment * second, rtol=1e-3, atol=1e-12)
        gaps.append((pseudo - exact).norm(dim=1))
    assert abs(float(torch.log2(gaps[0] / gaps[1]).median()) - 3) < 0.1


@three_processes
def test_pseudo_derivatives_are_one_idea_in_both_solvers(law: str) -> None:
    """Plain statistics and a schedule of constant moves: the same predictor, and the same corrector where it acts."""
    process = PROCESSES[law]
    denoiser, x = mixture().denoiser(process), start(mixture(), process, 16, 0.8)
    for v3, move in (
        (DPMSolverV3(None, 3, pseudo=True), Move(order=3, pseudo=True)),
        (DPMSolverV3(None, 4, pseudo=True), Move(order=4, pseudo=True)),
        (DPMSolverV3(None, 2, "pseudo"), Move(order=2, corrector=3, pseudo=True)),
    ):
        ends = [
            sample(denoiser, solver, grids.get("uniform"), 7, x=x, start=0.8, stop=0.1)
            for solver in (v3, Scheduled((move,)))
        ]
        assert torch.allclose(*ends, rtol=1e-9, atol=1e-10)


@three_processes
def test_a_step_may_start_from_an_older_state(law: str) -> None:
    """Through the newest belief alone from the state before it: the leapfrog; and no matter where the belief is a constant."""
    process, times = PROCESSES[law], (0.8, 0.6, 0.35)
    denoiser, x = mixture().denoiser(process), start(mixture(), process, 8, 0.8)
    solver = Scheduled((Move(order=1), Move(order=1, start=1)))
    *_, first, last = trajectory(denoiser, solver, grids.fixed(times), 2, x=x, start=0.8, stop=0.35)
    x0 = denoiser(first.x, 0.6, Context.of(8, None)).mean
    a, b = process.coef(0.8), process.coef(0.35)
    assert torch.allclose(last.x, b.sigma / a.sigma * x + (b.alpha - a.alpha * b.sigma / a.sigma) * x0)
    point = oracles.Gaussian(torch.tensor([0.7, -1.3]), torch.zeros(2)).denoiser(process)
    moves = (Move(order=2), Move(order=2, start=1), Move(order=2, start=2, corrector=2))
    ends = [sample(point, Scheduled(m), grids.get("uniform"), 5, x=x, start=0.8, stop=0.1) for m in (moves[:1], moves)]
    assert torch.allclose(*ends, rtol=1e-9, atol=1e-9)


def test_the_published_flags_follow_the_number_of_steps() -> None:
    made = {n: DPMSolverV3.published(None, n) for n in (5, 6, 10, 12)}
    flags = {n: (v.order, v.corrector, v.pseudo, v.taper) for n, v in made.items()}
    assert flags == {
        5: (3, "same", True, False), 6: (3, "same", False, True), 10: (3, "none", False, True), 12: (3, "same", False, True)
    }  # fmt: skip
