"""The exponential family: its weights against quadrature, and published formulas as its configurations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sweep import PROCESSES, lam_times, make, mixture, normal, start, three_processes
from torch import Tensor

from sfumato import grids
from sfumato.core import Context, InputError, sample
from sfumato.processes import DDPM, VP, MeanReverting
from sfumato.solvers._integral import between
from sfumato.solvers.adams import PseudoLinearMultistep, adams_bashforth
from sfumato.solvers.empirical import DPMSolverV3, EmpiricalStatistics
from sfumato.solvers.exponential import HeavyBall, Multistep, weights

PLACES = {
    "lambda": lambda c, t: c.lam,
    "angle": lambda c, t: c.angle,
    "rho": lambda c, t: c.sigma / c.alpha,
    "fraction": lambda c, t: c.sigma / (c.alpha + c.sigma),
    "soft": lambda c, t: math.log1p(c.sigma / c.alpha),
    "time": lambda c, t: t,
}


def same(a: str, b: str, law: str, steps: int = 8, grid: str = "arctan", **options: Any) -> None:
    process = PROCESSES[law]
    denoiser, x = mixture().denoiser(process), start(mixture(), process, 16, 0.9)
    one, other = (sample(denoiser, make(n), grids.get(grid), steps, x=x, start=0.9, seed=3, **options) for n in (a, b))
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-10), (one - other).abs().max()


@three_processes
@pytest.mark.parametrize("variable", list(PLACES))
@pytest.mark.parametrize(
    ("form", "eta"),
    [("data", 0.0), ("data", 0.6), ("noise", 0.0), ("noise", 1.0), ("v", 0.0), ("line", 0.0), ("flow", 0.0)],
)
def test_weights_integrate_polynomials_exactly(form: str, eta: float, variable: str, law: str) -> None:
    """Against adaptive quadrature of the variation-of-constants integral, for every monomial below the order."""
    from scipy.integrate import quad

    process, place = PROCESSES[law], PLACES[variable]
    lams = [-0.9, -0.6, 0.1, 0.4]
    for lam, back in [(0.8, lams[::-1]), (0.25, lams[::-1])] + ([] if eta else [(-1.3, lams)]):
        s, nodes = process.time(lam), tuple(process.time(v) for v in back)
        t = nodes[0]
        scale, *w = weights(process, form, variable, t, s, nodes, eta)
        a, b = process.coef(t), process.coef(s)
        radius = b.alpha + b.sigma if form == "line" else math.hypot(b.alpha, b.sigma)
        expected = {
            "data": b.sigma / a.sigma * math.exp(-eta * (b.lam - a.lam)),
            "noise": b.alpha / a.alpha, "v": radius / math.hypot(a.alpha, a.sigma), "flow": 1.0,
            "line": radius / (a.alpha + a.sigma),
        }[form]  # fmt: skip
        assert scale == pytest.approx(expected, rel=1e-9)
        for power in range(len(nodes)):

            def inside(u: float, k: int = power, b: Any = b, radius: float = radius) -> float:
                """The integrand over lambda, or over the angle, the fraction or time."""
                lam = {"v": lambda: -math.log(math.tan(u)), "line": lambda: math.log((1 - u) / u)}.get(
                    form, lambda: u
                )()
                at = u if form == "flow" else process.time(lam)
                value = place(process.coef(at), at) ** k
                if form == "data":
                    return b.sigma * (1 + eta) * math.exp((1 + eta) * u - eta * b.lam) * value
                return {"noise": -b.alpha * (1 + eta) * math.exp(-u), "flow": 1.0}.get(form, radius) * value

            parts = {
                "flow": (t, s),
                "v": (a.angle, b.angle),
                "line": (PLACES["fraction"](a, t), PLACES["fraction"](b, s)),
            }
            low, high = parts.get(form, (a.lam, b.lam))
            exact = quad(inside, low, high, epsabs=1e-13, epsrel=1e-13)[0]
            ours = math.fsum(wj * place(process.coef(n), n) ** power for wj, n in zip(w, nodes, strict=True))
            assert ours == pytest.approx(exact, rel=1e-7, abs=1e-9)


@three_processes
def test_names_that_are_the_same_method(law: str) -> None:
    same("dpm-solver-v3", "dpm-solver++", law)
    same("dpm-solver-v3(order=3)", "dpm-solver++(order=3)", law)
    same("dpm-solver++2s(order=1)", "ddim", law)
    same("dpm-solver++(order=1, form='noise')", "ddim", law)
    same("dpm-solver++(order=1, form='line')", "ddim", law)
    same("heavy-ball(beta=1.0)", "dpm-solver++", law)
    same("dpm-solver++(order=1, eta=1.0)", "ddpm", law)
    same("ghvb(terms=4, beta=1.0)", "ipndm", law, grid="uniform")
    same("ipndm(terms=1)", "ddim", law, grid="uniform")
    same("pndm(terms=1)", "ddim", law, grid="uniform")
    same("heavy-ball(terms=1, beta=0.6, form='noise')", "ghvb(terms=1, beta=0.6)", law, steps=1, grid="uniform")


def test_the_line_form_is_the_flow_form_of_flow_matching() -> None:
    """Where alpha + sigma = 1 and sigma = t the line is the flow's, its fraction is time, and every order agrees."""
    for order in (1, 2, 3, 4):
        same(
            f"dpm-solver++(order={order}, form='line', variable='fraction')",
            f"dpm-solver++(order={order}, form='flow', variable='time')",
            "flow",
        )


def adams_bashforth_azula(process: Any, x: Tensor, times: list[float], kind: str, order: int) -> Tensor:
    """azula's vAB and zEAB, from their documentation: a Vandermonde system for the weights of the history."""
    denoiser, past = mixture().denoiser(process), list[tuple[float, Tensor]]()
    for t, s in zip(times, times[1:], strict=False):
        a, b = process.coef(t), process.coef(s)
        x0 = denoiser(x, t, Context.of(len(x), None)).mean
        if kind == "vAB":
            u, w, outer, inner = (
                a.sigma / (a.alpha + a.sigma),
                b.sigma / (b.alpha + b.sigma),
                b.alpha + b.sigma,
                a.alpha + a.sigma,
            )
            value = x / a.sigma - (1 + a.alpha / a.sigma) * x0
        else:
            u, w, outer, inner = -a.lam, -b.lam, b.alpha, a.alpha
            value = (x - a.alpha * x0) / a.sigma
        past = [*past, (u, value)][-order:]
        powers = torch.arange(len(past), dtype=torch.float64)
        system = torch.tensor([v for v, _ in past], dtype=torch.float64)[None, :] ** powers[:, None]
        if kind == "vAB":
            moments = [(w ** (k + 1) - u ** (k + 1)) / (k + 1) for k in range(len(past))]
        else:  # of exp(v) v^k
            anti = [lambda v: 1.0, lambda v: v - 1, lambda v: v * v - 2 * v + 2][: len(past)]
            moments = [math.exp(w) * f(w) - math.exp(u) * f(u) for f in anti]
        weights = torch.linalg.solve(system, torch.tensor(moments, dtype=torch.float64))
        x = outer / inner * x + outer * sum(c * m for c, (_, m) in zip(weights, past, strict=True))
    return x


@three_processes
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("kind", "form", "variable"), [("vAB", "line", "fraction"), ("zEAB", "noise", "lambda")])
def test_adams_bashforth_of_other_libraries(kind: str, form: str, variable: str, order: int, law: str) -> None:
    process = PROCESSES[law]
    times = lam_times(process, 7, 2.0, -1.5)
    ends, x = {"start": float(times[0]), "stop": float(times[-1])}, start(mixture(), process, 8, float(times[0]))
    ours = sample(mixture().denoiser(process), Multistep(order, form, variable), grids.fixed(times), 7, x=x, **ends)
    theirs = adams_bashforth_azula(process, x, times.tolist(), kind, order)
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-9), (ours - theirs).abs().max()


@three_processes
@pytest.mark.parametrize("variable", list(PLACES))
def test_places_on_the_way_are_where_they_say(variable: str, law: str) -> None:
    """A share of the way in a variable is that share of it, and both ends are met."""
    process, place = PROCESSES[law], PLACES[variable]
    t, s = process.time(-1.1), process.time(0.9)
    low, high = (place(process.coef(u), u) for u in (t, s))
    for share in (0.0, 0.3, 1.0):
        u = between(process, variable, t, s, share)
        assert place(process.coef(u), u) == pytest.approx(low + share * (high - low), rel=1e-9, abs=1e-12)


def test_soft_is_lambda_in_noise_and_rho_in_data() -> None:
    """Weights in log(1 + rho) are those in lambda where rho is large, and those in rho where it is small."""
    process = VP(beta_min=1e-9, beta_max=40.0)
    for lams, other in (((-7.5, -8.0, -8.5), "lambda"), ((8.5, 8.0, 7.5), "rho")):
        nodes = tuple(process.time(lam) for lam in lams)
        s = process.time(lams[0] + 0.5)
        one, two = (weights(process, "v", v, nodes[0], s, nodes) for v in ("soft", other))
        assert one == pytest.approx(two, rel=0.02)


@pytest.mark.parametrize("n", [8, 10, 15, 20])
def test_soft_does_not_take_an_error_in_noise_for_a_slope(n: int) -> None:
    """An error of eps is one of v times 1 / alpha: what three nodes make of it on the noisy steps, over what one makes."""
    process, found = DDPM("linear"), {}
    times = grids.get("arc")(process, n, 1.0, 0.0).tolist()
    for variable in ("soft", "angle"):
        ratios = []
        for i in (1, 2, 3):
            nodes = tuple(times[i::-1][:3])
            _, *w = weights(process, "v", variable, times[i], times[i + 1], nodes)
            _, one = weights(process, "v", variable, times[i], times[i + 1], nodes[:1])
            made = sum(abs(v) / process.coef(t).alpha for v, t in zip(w, nodes, strict=False))
            ratios.append(made * process.coef(nodes[0]).alpha / abs(one))
        found[variable] = max(ratios)
    assert found["soft"] < 6 and found["angle"] > 6 * found["soft"]


def textbook(name: str, process: Any, x: Tensor, times: list[float]) -> Tensor:
    """Published updates, written with h and phi functions as in the papers."""
    denoiser = mixture().denoiser(process)

    def x0(y: Tensor, t: float) -> Tensor:
        return denoiser(y, t, Context.of(len(y), None)).mean

    past: list[tuple[float, Tensor]] = []
    for s, t in zip(times, times[1:], strict=False):
        a, b, d = process.coef(s), process.coef(t), x0(x, s)
        h = b.lam - a.lam
        phi1, ratio = math.expm1(-h), b.sigma / a.sigma
        phi2 = phi1 / h + 1
        if name == "2s":
            m = process.coef(mid := process.time(a.lam + h / 2))
            u = m.sigma / a.sigma * x - m.alpha * math.expm1(-h / 2) * d
            new = ratio * x - b.alpha * phi1 * d - b.alpha * phi1 * (x0(u, mid) - d)
        elif name == "res":
            m = process.coef(mid := process.time(a.lam + h / 2))
            u = m.sigma / a.sigma * x - m.alpha * math.expm1(-h / 2) * d
            new = ratio * x - b.alpha * phi1 * d + b.alpha * phi2 / 0.5 * (x0(u, mid) - d)
        elif not past:
            new = ratio * x - b.alpha * phi1 * d
        else:
            r0 = (a.lam - past[0][0]) / h
            first = (d - past[0][1]) / r0
            if name == "midpoint":
                new = ratio * x - b.alpha * phi1 * d - 0.5 * b.alpha * phi1 * first
            elif name == "exact" or len(past) < 2:
                new = (
                    ratio * x - b.alpha * phi1 * d + b.alpha * phi2 * first
                    if name == "exact"
                    else (ratio * x - b.alpha * phi1 * d - 0.5 * b.alpha * phi1 * first)
                )
            else:  # 3M as released
                r1 = (past[0][0] - past[1][0]) / h
                second = (past[0][1] - past[1][1]) / r1
                d1, d2 = first + r0 / (r0 + r1) * (first - second), (first - second) / (r0 + r1)
                new = ratio * x - b.alpha * phi1 * d + b.alpha * phi2 * d1 - b.alpha * (phi2 / h - 0.5) * d2
        past, x = [(a.lam, d), *past], new
    return x


@three_processes
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("2s", "dpm-solver++2s"), ("res", "res"), ("midpoint", "dpm-solver++(rule='midpoint')"), ("exact", "dpm-solver++"),
        ("3m", "dpm-solver++3m(taper=False)"),
    ],
)  # fmt: skip
def test_published_updates(name: str, spec: str, law: str) -> None:
    process = PROCESSES[law]
    times = lam_times(process, 7, 2.0, -1.5)
    x = start(mixture(), process, 8, float(times[0]))
    ours = sample(
        mixture().denoiser(process),
        make(spec),
        grids.fixed(times),
        7,
        x=x,
        start=float(times[0]),
        stop=float(times[-1]),
    )
    assert torch.allclose(ours, textbook(name, process, x, times.tolist()), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
def test_the_stochastic_mean_reverting_sampler(order: int) -> None:
    """SDE data-1 and data-2M of MR Sampler, written with the anchor mu as published, on the anchored process."""
    process, mu = MeanReverting(), normal(5, 2, seed=3)
    denoiser = mixture().denoiser(process)
    times = lam_times(process, 6, 1.5, -1.0).tolist()
    zs = [normal(5, 2, seed=40 + k) for k in range(6)]
    cond = {"anchor": mu}
    x = begin = mu + normal(5, 2, seed=1)
    past: tuple[float, Tensor] | None = None
    for k, (s, t) in enumerate(zip(times, times[1:], strict=False)):
        a, b = process.coef(s), process.coef(t)
        h = b.lam - a.lam
        y = x - (1 - a.alpha) * mu
        d = denoiser(y, s, Context.of(5, None)).mean
        slow = b.alpha * (1 - math.exp(-2 * h))
        new = b.sigma / a.sigma * math.exp(-h) * x + slow * d + b.sigma * math.sqrt(-math.expm1(-2 * h)) * zs[k]
        new = new + mu * (1 - b.alpha / a.alpha * math.exp(-2 * h) - slow)
        if order == 2 and past is not None:
            r = (a.lam - past[0]) / h
            new = new + b.alpha * (1 - (1 - math.exp(-2 * h)) / (2 * h)) * (d - past[1]) / r
        past, x = (a.lam, d), new
    taken = iter(zs)
    ctx = Context.of(5, 0, cond=cond, dtype=torch.float64, source=lambda ctx, fresh: next(taken))
    grid = grids.fixed(torch.tensor(times, dtype=torch.float64))
    ours = sample(denoiser, Multistep(order, eta=1.0), grid, 6, x=begin, start=times[0], stop=times[-1], ctx=ctx)
    assert torch.allclose(ours, x, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5])
def test_momentum_weights_keep_the_order(terms: int, beta: float) -> None:
    """They sum to 1, and integrate polynomials of degree < terms through the averaged history."""
    w = adams_bashforth(terms, beta)
    assert sum(w) == pytest.approx(1.0)
    for power in range(terms):
        v, history = 0.0, []
        for n in range(-400, 1):
            v = (1 - beta) * v + beta * n**power
            history.insert(0, v)
        assert sum(wj * h for wj, h in zip(w, history, strict=False)) == pytest.approx(
            1 / (power + 1), rel=1e-6, abs=1e-6
        )


@pytest.mark.parametrize(
    ("terms", "beta", "momentum", "interval"),
    [
        (1, 1.0, "generalized", 2.0), (1, 0.5, "generalized", 6.0), (2, 1.0, "generalized", 1.0),
        (2, 0.5, "generalized", 1.5), (3, 0.5, "generalized", 0.78), (4, 1.0, "generalized", 0.30),
        (4, 0.5, "generalized", 0.43), (2, 0.5, "heavy-ball", 3.0), (4, 0.5, "heavy-ball", 0.90),
    ],
)  # fmt: skip
def test_interval_of_stability(terms: int, beta: float, momentum: str, interval: float) -> None:
    """On dy = -k y the recursion stays bounded up to the published |step k| (Wizadwongsa et al. 2024), and not beyond."""
    w = adams_bashforth(terms, beta if momentum == "generalized" else 1.0)

    def grows(size: float) -> bool:
        y, past, velocity = 1.0, [], None
        for _ in range(4000):
            e = -y
            if momentum == "generalized" and past:
                e = (1 - beta) * past[0] + beta * e
            past = [e, *past][:terms]
            padded = [*past, *[past[-1]] * (terms - len(past))]
            move = sum(wj * v for wj, v in zip(w, padded, strict=True))
            if momentum == "heavy-ball":
                velocity = move if velocity is None else (1 - beta) * velocity + beta * move
                move = velocity
            y += size * move
            if abs(y) > 1e6:
                return True
        return False

    assert not grows(interval - 0.02) and grows(interval + 0.02)


def test_adaptive_steps_follow_the_tolerance() -> None:
    """A smaller tolerance costs more calls and leaves a smaller error."""
    process = PROCESSES["vp"]
    x = start(mixture(), process, 32)
    fine = sample(mixture().denoiser(process), make("dpm-solver-3"), grids.get("logsnr"), 200, x=x, stop=0.01)
    calls, errors = [], []
    for rtol, atol in ((0.2, 0.03), (0.05, 0.0078), (0.01, 0.0015)):
        ctx = Context.of(32, 0, dtype=torch.float64)
        solver = make(f"dpm-solver-adaptive(rtol={rtol}, atol={atol})")
        y = sample(mixture().denoiser(process), solver, grids.get("uniform"), 1, x=x, stop=0.01, ctx=ctx)
        calls.append(ctx.run.nfe)
        errors.append(float((y - fine).norm(dim=-1).median()))
    assert calls == sorted(calls) and errors == sorted(errors, reverse=True) and errors[-1] < 0.01


@pytest.mark.parametrize(
    "make_it",
    [
        lambda: Multistep(order=6), lambda: Multistep(form="score"), lambda: Multistep(form="v", eta=1.0),
        lambda: Multistep(form="line", eta=1.0), lambda: make("dpm-solver++2s(form='line')"),
        lambda: Multistep(variable="sigma"), lambda: Multistep(rule="heun"), lambda: HeavyBall(beta=0.0),
        lambda: PseudoLinearMultistep(terms=6), lambda: PseudoLinearMultistep(beta=0.5), lambda: make("dpm-solver++2s(order=4)"),
        lambda: make("dpm-solver-adaptive(order=4)"), lambda: make("heun-ancestral(eta=0.0)"),
        lambda: make("heun-ancestral(inner='ddpm')"), lambda: DPMSolverV3(order=5),
        lambda: DPMSolverV3(corrector="half"),
        lambda: EmpiricalStatistics(torch.tensor([1.0, 0.0]), *[torch.zeros(2)] * 3),
    ],
    ids=range(17),
)  # fmt: skip
def test_impossible_numbers_are_refused(make_it: Any) -> None:
    with pytest.raises(InputError):
        make_it()


def test_unequal_times_are_refused_where_the_weights_need_equal_ones() -> None:
    denoiser = mixture().denoiser(VP())
    with pytest.raises(InputError, match="equally spaced times"):
        sample(denoiser, make("pndm"), grids.get("logsnr"), 10, shape=(2, 2))
