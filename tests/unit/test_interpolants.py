"""Stochastic interpolants: paths, exact beliefs against their own densities, samplers without sampling noise, learning."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato.core import Context, InputError, sample
from sfumato.denoisers.interpolants import GaussianMixtureInterpolant, Interpolated, Reversed
from sfumato.objectives.interpolant import InterpolantMatching
from sfumato.processes import EDM, VE, VP, Cosine, Flow, Interpolant, Transport
from sfumato.processes.interpolant import GAMMAS, PATHS
from sfumato.solvers.interpolant import InterpolantSDE, ends

F64 = torch.float64
LAWS = {
    f"{path}-{gamma}": Interpolant(path, gamma, 0.8)
    for path in PATHS
    for gamma in GAMMAS
    if not (gamma == "zero" and path in ("encoding-decoding", "mirror"))
}
every_law = pytest.mark.parametrize("name", list(LAWS))
inner_times = st.floats(0.02, 0.98).filter(lambda t: abs(t - 0.5) > 1e-3)


def ctx(n: int, **fields: Any) -> Context:
    return Context.of(n, 0, dtype=F64, **fields)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mixtures() -> GaussianMixtureInterpolant:
    data = sf.oracles.GaussianMixture(
        [[-1.5, 0.5], [1.0, 1.2], [0.6, -1.3]], [[0.4, 0.3], [0.3, 0.5], [0.5, 0.3]], [0.5, 0.3, 0.2]
    )
    base = sf.oracles.GaussianMixture([[0.5, 0.0], [-1.0, -1.0]], [[0.6, 0.4], [0.4, 0.7]], [0.4, 0.6])
    return GaussianMixtureInterpolant(data, base)


def line(data: tuple[float, float], base: tuple[float, float]) -> GaussianMixtureInterpolant:
    """Between two normals on the line, given as (mean, std)."""
    return GaussianMixtureInterpolant(*(sf.oracles.GaussianMixture([[m]], [s]) for m, s in (data, base)))


# ------------------------------------------------------------------ paths


@every_law
@settings(max_examples=30)
@given(t=inner_times)
def test_derivatives_are_derivatives(name: str, t: float) -> None:
    law = LAWS[name]
    at = torch.tensor([t], dtype=F64, requires_grad=True)
    values, c = law._law(at, torch)[:3], law.at(t)
    for value, declared in zip(values, c[3:6], strict=True):
        (slope,) = torch.autograd.grad((value + 0 * at).sum(), at, retain_graph=True)
        assert declared == pytest.approx(float(slope), rel=1e-6, abs=1e-9)
    assert c.product == pytest.approx(c.gamma * c.dgamma, rel=1e-9, abs=1e-12)
    assert [float(v[0]) for v in law.at(at.detach())] == pytest.approx(list(c), rel=1e-12, abs=1e-12)


@every_law
def test_both_ends_are_exact_and_each_law_is_its_own_mirror_image(name: str) -> None:
    law = LAWS[name]
    x0, x1, z = (normal(4, 2, seed=k) for k in range(3))
    far = x0 if law.path == "mirror" else x1
    torch.testing.assert_close(law.between(x0, x1, 0.0, z), x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(law.between(x0, x1, 1.0, z), far, rtol=0, atol=1e-15)
    for t in (0.1, 0.37):
        a, b = law.at(t), law.at(1 - t)
        swapped = a if law.path == "mirror" else (a.beta, a.alpha, a.gamma, -a.dbeta, -a.dalpha, -a.dgamma)
        if law.path != "mirror":
            assert list(b[:6]) == pytest.approx(swapped, rel=1e-9, abs=1e-12)


def test_one_sided_paths_are_gaussian_laws() -> None:
    assert Interpolant.one_sided() == Flow() and Interpolant.one_sided("trigonometric") == Cosine()
    x0, noise = normal(4, 2), normal(4, 2, seed=1)
    for path in ("linear", "trigonometric"):
        law, two = Interpolant.one_sided(path), Interpolant(path, "zero")
        for t in (0.2, 0.7):
            pair = two.between(x0, noise, t, torch.zeros_like(x0))
            torch.testing.assert_close(law.corrupt(x0, t, ctx(4), noise=noise)[0], pair, rtol=1e-12, atol=1e-12)
    data, base = mixtures().data, sf.oracles.GaussianMixture([[0.0, 0.0]], [1.0])
    two_sided = GaussianMixtureInterpolant(data, base).denoiser(Interpolant("linear", "zero"))
    flow = data.denoiser(Flow())(x0, 0.6, ctx(4)).view("flow")
    torch.testing.assert_close(two_sided(x0, 0.6, ctx(4)).view("flow"), flow, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ exact beliefs


@pytest.mark.parametrize("name", [n for n in LAWS if not n.startswith("mirror")])
@pytest.mark.parametrize("t", [0.15, 0.45, 0.8])
def test_the_velocity_transports_the_density_and_the_score_is_its_gradient(name: str, t: float) -> None:
    """d log rho / dt + b . grad log rho + div b = 0 and s = grad log rho, by automatic differentiation."""
    law, m = LAWS[name], mixtures()
    x = (m.data.sample(20) + m.base.sample(20)) / 2
    at = torch.full((20,), t, dtype=F64, requires_grad=True)
    point = x.clone().requires_grad_()
    log_density = m.log_prob(point, law.at(at))
    in_time, score = torch.autograd.grad(log_density.sum(), (at, point))
    belief = m.denoiser(law)(x, t, ctx(20))
    torch.testing.assert_close(belief.view("score"), score, rtol=1e-8, atol=1e-8)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: m.readings(v[None], law.at(t))["flow"][0]))(x)
    divergence = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    residual = in_time + (belief.view("flow") * score).sum(1) + divergence
    assert residual.abs().max() < 1e-7


@every_law
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_all_readings_follow_from_two(name: str, t: float) -> None:
    law, m = LAWS[name], mixtures()
    x, c = m.data.sample(6), law.at(t)
    exact = m.denoiser(law)(x, t, ctx(6))
    assert all(bool(v.isfinite().all()) for v in exact.given.values())
    inside = c.alpha * exact.view("x0") + c.beta * exact.view("x1") + c.gamma * exact.view("eps")
    torch.testing.assert_close(inside, x, rtol=1e-9, atol=1e-9)
    if t in (0.0, 1.0) and law.gamma != "zero":
        return
    for pair in (("flow", "eps"), ("drift", "score" if law.gamma != "zero" else "eps")):
        belief = Transport({k: exact.view(k) for k in pair}, x, c)
        for kind in ("flow", "drift", "eps", *(("x0", "x1") if law.path in ("linear", "trigonometric") else ())):
            torch.testing.assert_close(belief.view(kind), exact.view(kind), rtol=1e-8, atol=1e-8)
    if law.path in ("mirror", "encoding-decoding"):
        seen = "x0" if law.path == "mirror" or t < 0.5 else "x1"
        torch.testing.assert_close(belief.view(seen), exact.view(seen), rtol=1e-8, atol=1e-8)


def test_a_clock_an_item() -> None:
    law, m = Interpolant("trigonometric"), mixtures()
    x, t = m.data.sample(3), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    together = m.denoiser(law)(x, t, ctx(3))
    only = {"flow": together.view("flow"), "eps": together.view("eps")}
    for i in range(3):
        one = m.denoiser(law)(x[i : i + 1], float(t[i]), ctx(1))
        for kind in ("flow", "drift", "eps", "score", "x0", "x1"):
            torch.testing.assert_close(
                Transport(only, x, law.at(t)).view(kind)[i : i + 1], one.view(kind), rtol=1e-8, atol=1e-8
            )
    stepped = InterpolantSDE(0.0).step(sf.Step(x, t), t - 0.05, m.denoiser(law), ctx(3)).x
    for i in range(3):
        st_ = sf.Step(x[i : i + 1], float(t[i]))
        alone = InterpolantSDE(0.0).step(st_, float(t[i]) - 0.05, m.denoiser(law), ctx(1)).x
        torch.testing.assert_close(stepped[i : i + 1], alone, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ sampling


def law_of_end(denoiser: Any, solver: InterpolantSDE, steps: int, mean: float, std: float) -> tuple[float, float]:
    """Exact mean and variance at the end of a run on the line: every step is affine in x and in its noise."""
    m, v = mean, std * std
    times = ends()(None, steps, 1.0, 0.0).tolist()
    for t, s in zip(times, times[1:], strict=False):
        units = torch.tensor([[0.0], [0.0], [1.0]], dtype=F64)
        run = ctx(3, source=lambda c, fresh, units=units: units)
        x = torch.tensor([[0.0], [1.0], [0.0]], dtype=F64)
        shift, a, b = solver.step(sf.Step(x, t), s, denoiser, run).x[:, 0].tolist()
        m, v = shift + (a - shift) * m, (a - shift) ** 2 * v + (b - shift) ** 2
    return m, v


@pytest.mark.parametrize("solver", [
    "interpolant(epsilon=0.0)", "interpolant(epsilon=0.5, power=0.0)", "interpolant(epsilon=2.0, power=0.0)",
    "interpolant", "interpolant(epsilon=4.0, power=2.0)", "interpolant(epsilon=1.0, method='euler')",
])  # fmt: skip
@pytest.mark.parametrize(
    "law", ["linear-brownian", "trigonometric-quadratic", "encoding-decoding-sine-squared", "linear-sigmoid"]
)
@pytest.mark.parametrize("backward", [False, True])
def test_every_epsilon_has_the_same_marginals(law: str, solver: str, backward: bool) -> None:
    made, data, base = sf.solvers.registry.make(solver), (1.0, 0.6), (-1.0, 0.9)
    denoiser = line(data, base).denoiser(LAWS[law])
    (mean, std), (m0, s0) = (data, base) if backward else (base, data)
    if backward:
        denoiser = Reversed(denoiser)
    (_, coarse), (m, fine) = (law_of_end(denoiser, made, n, mean, std) for n in (120, 240))
    assert m == pytest.approx(m0, abs=2e-2)
    assert fine == pytest.approx(s0 * s0, rel=0.08)
    assert 2 * fine - coarse == pytest.approx(s0 * s0, rel=0.03)  # what is left is of first order and vanishes


@pytest.mark.parametrize(
    "law", ["linear-brownian", "trigonometric-quadratic", "encoding-decoding-sigmoid", "linear-zero", "mirror-brownian"]
)
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_flow_is_followed_with_the_declared_order(law: str, method: str, order: int) -> None:
    m, solver = mixtures(), InterpolantSDE(0.0, method=method)
    assert solver.order == order and not solver.stochastic
    x = (m.data if law.startswith("mirror") else m.base).sample(60, 3)
    denoiser = m.denoiser(LAWS[law])
    exact = sample(denoiser, InterpolantSDE(0.0), ends(), 1280, x=x)
    errors = [(sample(denoiser, solver, ends(), n, x=x) - exact).norm(dim=1).median() for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) > order - 0.25


def test_samples_of_a_mixture_and_the_way_there_and_back() -> None:
    m, n = mixtures(), 3000
    x1, x0 = m.base.sample(n, 1), m.data.sample(n, 2)
    floor = sf.evaluation.metrics.sliced_wasserstein(x0, m.data.sample(n, 3)).value
    denoiser = m.denoiser(Interpolant())
    noises = torch.Generator().manual_seed(0)
    for epsilon in (0.0, 1.0):
        run = ctx(n, source=lambda c, fresh: torch.randn(n, 2, generator=noises, dtype=F64))
        y = sample(denoiser, InterpolantSDE(epsilon, 0.0), ends(), 40, x=x1, ctx=run)
        assert sf.evaluation.metrics.sliced_wasserstein(y, x0).value < 2 * floor + 0.02
    code = sample(denoiser, InterpolantSDE(0.0), ends(), 100, x=x0[:200], start=0.0, stop=1.0)
    assert (sample(denoiser, InterpolantSDE(0.0), ends(), 100, x=code) - x0[:200]).norm() / x0[:200].norm() < 5e-3
    other = sample(Reversed(denoiser), InterpolantSDE(0.0), ends(), 100, x=x0[:200])
    torch.testing.assert_close(other, code, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("law", [VP(), VE(), EDM(), Flow(), Cosine()], ids=repr)
def test_without_noise_it_is_heun_or_ddim_on_a_gaussian_law(law: Any) -> None:
    denoiser = mixtures().data.denoiser(law)
    for name, spec in (("heun", "interpolant(epsilon=0.0)"), ("ddim", "interpolant(epsilon=0.0, method='euler')")):
        one, other = (sf.sample(denoiser, solver=s, steps=12, shape=(5, 2), dtype=F64) for s in (name, spec))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_steps_draw_first_count_their_calls_and_resume() -> None:
    denoiser, x = mixtures().denoiser(Interpolant()), mixtures().base.sample(4)
    for method, calls in (("heun", 2 * 6 - 1), ("euler", 6)):
        run = ctx(4)
        states = list(sf.trajectory(denoiser, solver=InterpolantSDE(method=method), grid=ends(), steps=6, x=x, ctx=run))
        assert run.run.nfe == calls
        rest = list(sf.trajectory(denoiser, solver=InterpolantSDE(method=method), grid=ends(), steps=6, x=pickle.loads(pickle.dumps(states[3])), seed=0))  # fmt: skip
        assert torch.equal(rest[-1].x, states[-1].x)


# ------------------------------------------------------------------ learning


class Scaled(nn.Module):
    """An exact reading times one parameter: its quadratic loss has its minimum at 1."""

    def __init__(self, m: GaussianMixtureInterpolant, law: Interpolant, kind: str) -> None:
        super().__init__()
        self.exact, self.kind, self.factor = m.denoiser(law), kind, nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.factor * self.exact(x, label.double(), ctx(len(x))).view(self.kind)


@pytest.mark.parametrize("kinds", [("flow", "eps"), ("drift", "score"), ("flow",)])
@pytest.mark.parametrize("law", ["linear-brownian", "trigonometric-quadratic", "encoding-decoding-sine-squared"])
def test_the_exact_conditional_means_minimise_the_losses(kinds: tuple[str, ...], law: str) -> None:
    m, n = mixtures(), 20000
    denoiser = Interpolated({kind: Scaled(m, LAWS[law], kind) for kind in kinds}, LAWS[law])
    quick = Context.of(n, 0, source=lambda c, fresh: normal(n, 2, seed=9))
    loss = InterpolantMatching(denoiser, times=lambda process, streams: (torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(4)) * 0.9 + 0.05, torch.ones(n, dtype=F64)))  # fmt: skip
    found = loss({"x": m.data.sample(n, 5), "x1": m.base.sample(n, 6)}, quick)
    for net in denoiser.networks.values():
        (first,) = torch.autograd.grad(found.total, net.factor, create_graph=True)
        (second,) = torch.autograd.grad(first, net.factor, retain_graph=True)
        assert abs(float((first / second).detach())) < 0.03  # Newton's step from 1 to the minimum


def test_antithetic_pairs_take_the_variance_at_the_ends_away() -> None:
    """Near an end the loss of the velocity has variance 1 / gamma^2 without them and a bounded one with them."""
    m, law, n, early = mixtures(), Interpolant(), 200, 1e-4
    denoiser = Interpolated({"flow": Scaled(m, law, "flow")}, law)
    at_end = lambda process, streams: (torch.full((1,), early, dtype=F64), torch.ones(1, dtype=F64))  # noqa: E731
    x0, x1 = m.data.sample(n, 1), m.base.sample(n, 2)
    spread = {}
    for antithetic in (True, False):
        objective = InterpolantMatching(denoiser, antithetic=antithetic, times=at_end)
        each = [
            float(objective({"x": x0[i : i + 1], "x1": x1[i : i + 1]}, Context.of(1, i)).total.detach())
            for i in range(200)
        ]
        spread[antithetic] = torch.tensor(each).std()
    assert spread[True] < 0.1 * spread[False]


def test_batches_conditions_and_streams_of_the_objective() -> None:
    seen: list[Tensor] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor, label: Tensor, strength: Tensor) -> Tensor:
            seen.append(torch.stack([label, strength]))
            return self.weight * x

    law = Interpolant()
    objective = InterpolantMatching(Interpolated({"flow": Net(), "eps": Net()}, law))
    x, x1, strength = normal(4, 2).float(), normal(4, 2, seed=1).float(), torch.arange(4.0)
    whole = objective({"x": x, "x1": x1, "cond": {"strength": strength}}, Context.of(4, 7))
    assert set(whole.terms) == {"flow", "eps"} and set(objective.players()) == {"denoiser"}
    torch.testing.assert_close(seen[0][1], strength.repeat(2))
    torch.testing.assert_close(seen[0][0][:4], seen[0][0][4:])
    parts = [objective({"x": x[i : i + 2], "x1": x1[i : i + 2], "cond": {"strength": strength[i : i + 2]}}, Context(rng=Context.of(4, 7).rng.select(slice(i, i + 2)), batch=2)).total for i in (0, 2)]  # type: ignore[union-attr]  # fmt: skip
    torch.testing.assert_close(torch.stack(parts).mean(), whole.total, rtol=1e-5, atol=1e-6)
    drawn = InterpolantMatching(Interpolated({"flow": nn.Bilinear(2, 1, 2)}, law), antithetic=False)
    with pytest.raises(InputError, match="one shape"):
        objective({"x": x, "x1": x1[:3], "cond": {"strength": strength}}, Context.of(4, 7))
    with pytest.raises(InputError, match="the batch has"):
        drawn({"images": x}, Context.of(4))
    with pytest.raises(InputError, match="streams"):
        drawn({"x": x}, Context.of(4, None))


def test_the_mirror_path_needs_only_the_noise() -> None:
    m, law = mixtures(), LAWS["mirror-brownian"]
    learned = Interpolated({"eps": Scaled(m, law, "eps")}, law)
    x = m.data.sample(5)
    one, other = (sample(d, InterpolantSDE(0.0), ends(), 20, x=x) for d in (learned, m.denoiser(law)))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Interpolant("trigonometric", "sine-squared"), "lower scale"),
        (lambda: Interpolant("trigonometric", "brownian", 2.0), "lower scale"),
        (lambda: Interpolant("mirror", "zero"), "another gamma"),
        (lambda: Interpolant("encoding-decoding", "zero"), "another gamma"),
        (lambda: Interpolant("curved"), "linear"),
        (lambda: Interpolant(gamma="white"), "brownian"),
        (lambda: Interpolant(scale=0.0), "above 0"),
        (lambda: Interpolant.one_sided("mirror"), "one-sided"),
        (lambda: Interpolant().at(1.5), "times are in"),
        (lambda: Interpolant().between(torch.zeros(3, 2), torch.zeros(2, 2), 0.5, torch.zeros(3, 2)), "one shape"),
        (
            lambda: Interpolant().target("flow", torch.zeros(3, 2), torch.zeros(3, 2), 0.0, torch.zeros(3, 2)),
            "infinite",
        ),
        (lambda: Interpolant().target("flow", torch.zeros(3, 2), torch.zeros(3, 2), 0.5), "pairs"),
        (lambda: Interpolated({"flow": nn.Identity(), "drift": nn.Identity()}, Interpolant()), "at most one"),
        (lambda: Interpolated({"eps": nn.Identity()}, Interpolant()), "needs a network"),
        (lambda: Interpolated({"drift": nn.Identity()}, Interpolant()), "add a network"),
        (lambda: Interpolated({"flow": nn.Identity()}, Interpolant("mirror")), "mirror"),
        (lambda: InterpolantSDE(-1.0), "negative"),
        (lambda: InterpolantSDE(method="midpoint"), "heun"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_what_cannot_be_run_is_refused_with_a_way_out() -> None:
    denoiser, x = mixtures().denoiser(Interpolant()), mixtures().base.sample(2)
    for options in ({"solver": "ddim", "grid": "uniform"}, {"solver": "interpolant"}):
        with pytest.raises(InputError, match="solver='interpolant', grid='uniform'"):
            sf.sample(denoiser, x=x, steps=3, **options)
    with pytest.raises(InputError, match="give x="):
        sf.sample(denoiser, solver="interpolant", grid="uniform", shape=(2, 2), steps=3)
    with pytest.raises(InputError, match="epsilon=0"):
        silent = mixtures().denoiser(Interpolant("linear", "zero"))
        sf.sample(silent, solver="interpolant", grid="uniform", x=x, steps=3)
    only = Interpolated({"flow": Scaled(mixtures(), Interpolant(), "flow")}, Interpolant())
    with pytest.raises(InputError, match="does not follow"):
        sf.sample(only, solver="interpolant", grid="uniform", x=x, steps=3)
    sf.sample(only, solver="interpolant(epsilon=0.0)", grid="uniform", x=x, steps=3)
    with pytest.raises(InputError, match="not one of"):
        denoiser(x, 0.5, ctx(2)).view("momentum")
