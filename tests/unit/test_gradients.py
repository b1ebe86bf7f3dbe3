"""Gradients through sampling: against ordinary backpropagation, and against closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato import gradients, grids, oracles, processes, solvers
from sfumato.core import Context, Denoiser, InputError, Posterior, Solver, Step, Wrapper, linear
from sfumato.gradients import Adjoint, Checkpoint, Memory
from sfumato.gradients.adjoint import lagrange

DOUBLE = torch.float64
PAIRED = {"interpolant"}  # needs another start; its own class serves Gaussian laws and is swept with the rest


def network(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    net = sf.networks.MLP(3, width=16, depth=1, vector_channels=4, scale=1.0, **options).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def guided(process=None, kind: str = "v", net: nn.Module | None = None) -> Denoiser:
    return sf.guidance.cfg(2.0)(
        sf.parametrized(net or network(), process or processes.VP(), kind, null={"vector": 0.0})
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def derivatives(denoiser: Denoiser, method, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sample and the gradients of a function of it by start, condition and every parameter."""
    x, c = normal(4, 3).requires_grad_(), normal(4, 4, seed=1).requires_grad_()
    end = gradients.sample(denoiser, method=method, x=x, cond={"vector": c}, **options)
    found = torch.autograd.grad((end * normal(3, seed=2)).square().sum(), [x, c, *denoiser.parameters()])
    return end.detach(), list(found)


def worst(found, exact) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("store", ["all", "sqrt"])
@pytest.mark.parametrize("name", [n for n in solvers.names() if n not in PAIRED])
def test_checkpointing_is_backpropagation_for_every_solver(name, store):
    denoiser, options = guided(), {"solver": name, "steps": 5, "grid": "uniform", "stop": 0.01, "seed": 3}
    try:
        end, exact = derivatives(denoiser, "plain", **options)
    except InputError as error:
        pytest.skip(f"refused: {error}")
    again, found = derivatives(denoiser, Checkpoint(store), **options)
    assert torch.equal(end, again)
    assert worst(found, exact) <= 1e-12


@pytest.mark.parametrize(
    "law", [processes.VE(), processes.EDM(), processes.Flow(), processes.Cosine(), processes.DDPM("linear")]
)
def test_checkpointing_is_backpropagation_in_every_law_and_upwards(law):
    for span in ({"start": 0.9, "stop": 0.0}, {"start": 0.1, "stop": 0.8}):
        options = {"solver": "heun", "steps": 4, "grid": "uniform", **span}
        denoiser = guided(law)
        assert (
            worst(derivatives(denoiser, "checkpoint", **options)[1], derivatives(denoiser, "plain", **options)[1])
            <= 1e-12
        )


def test_the_anchor_of_an_affine_law_gets_its_gradient_at_the_start_in_the_network_and_at_the_end():
    denoiser, found = sf.parametrized(network(), processes.MeanReverting(), "v"), {}
    for method in ("plain", "checkpoint", "adjoint"):
        anchor = normal(4, 3, seed=5).requires_grad_()
        end = gradients.sample(
            denoiser,
            method=method,
            shape=(4, 3),
            dtype=DOUBLE,
            cond={"anchor": anchor},
            solver="heun",
            steps=30,
            stop=0.05,
        )
        found[method] = torch.autograd.grad(end.square().sum(), [anchor])
    assert worst(found["checkpoint"], found["plain"]) <= 1e-12
    assert worst(found["adjoint"], found["plain"]) <= 1e-2


def test_gradients_flow_on_to_what_start_and_conditions_were_made_from():
    denoiser, found = guided(), []
    for method in ("plain", "checkpoint"):
        root = normal(4, 4).requires_grad_()
        end = gradients.sample(denoiser, method=method, x=2 * root[:, :3], cond={"vector": root.tanh()}, steps=4)
        end.sum().backward()
        found.append(root.grad)
    assert worst(found[1:], found[:1]) <= 1e-12


class Remembers(Wrapper):
    """Mixes each belief with that of the step before, kept in the Context."""

    def forward(self, x, t, ctx):
        post = self.inner(x, t, ctx)
        before = ctx.memory.get("v", torch.zeros_like(x))
        v = 0.7 * post.view("v") + 0.3 * before
        ctx.after(lambda y, s: ctx.memory.update(v=v + 0.1 * y))
        return Posterior(v, "v", x, post.coef)


@pytest.mark.parametrize("store", ["all", "sqrt"])
def test_gradients_pass_through_what_wrappers_remember(store):
    denoiser = Remembers(guided())
    exact = derivatives(denoiser, "plain", steps=7)[1]
    assert worst(derivatives(denoiser, Checkpoint(store), steps=7)[1], exact) <= 1e-12


@dataclass(frozen=True)
class Coupled(Solver):
    """Two states that move each other in turn, in the normalised angle: reversible, a test case."""

    sign: int = 1
    reversible = True
    nfe = 2.0

    def init(self, x, t, denoiser, ctx):
        return Step(x, t, x)

    def step(self, st, s, denoiser, ctx):
        a, b = denoiser.process.coef(st.t), denoiser.process.coef(s)

        def move(z, of, t):
            return linear(1.0, z, b.angle - a.angle, denoiser(of, t, ctx).view("v"))

        if self.sign > 0:
            x = move(st.x, st.carry, st.t)
            return Step(x, s, move(st.carry, x, s))
        y = move(st.carry, st.x, st.t)
        return Step(move(st.x, y, s), s, y)

    def inverse(self):
        return Coupled(-self.sign)


def test_a_reversible_solver_is_taken_back_instead_of_stored():
    options = {"solver": Coupled(), "steps": 12, "grid": "uniform", "stop": 0.02}
    exact = derivatives(guided(), "plain", **options)[1]
    assert worst(derivatives(guided(), Checkpoint("inverse"), **options)[1], exact) <= 1e-9
    with pytest.raises(InputError, match="no exact inverse"):
        derivatives(guided(), Checkpoint("inverse"), solver="heun")
    with pytest.raises(InputError, match="remember"):
        derivatives(Remembers(guided()), Checkpoint("inverse"), **options)


def times(n: int) -> torch.Tensor:
    """n intervals in lambda, the first at either end split: high orders need a start."""
    law, h = processes.VP(), 3.0 / n
    lams = [-1.5, *(-1.5 + h * 2.0**-k for k in range(8, 0, -1)), *(-1.5 + h * i for i in range(1, n))]
    return torch.tensor([law.time(v) for v in [*lams, *(1.5 - h * 2.0**-k for k in range(1, 9)), 1.5]], dtype=DOUBLE)


@pytest.mark.parametrize("variable", ["angle", "rho", "t"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_adjoint_converges_to_the_exact_gradient_with_its_order(order, variable):
    law, data = processes.VP(), oracles.Gaussian(torch.tensor([0.6, -0.3, 0.1]), torch.tensor([1.5, 0.3, 0.04]))
    mean = data.mean.requires_grad_()  # the drift depends on it
    found = []
    for n in (64, 128):
        grid = times(n)
        x = normal(5, 3).requires_grad_()
        a, b = law.coef(float(grid[0])), law.coef(float(grid[-1]))
        end = gradients.sample(
            data.denoiser(law), method=Adjoint(order, variable), solver="heun", grid=grids.fixed(grid), steps=len(grid) - 1,
            x=x, start=float(grid[0]), stop=float(grid[-1]), parameters=[mean],
        )  # fmt: skip
        weight = normal(5, 3, seed=4)
        got = torch.autograd.grad((end * weight).sum(), [x, mean])
        exact = torch.autograd.grad((data.transport(x, a, b) * weight).sum(), [x, mean])
        found.append([(u - v).norm() for u, v in zip(got, exact, strict=True)])
    slopes = [float(torch.log2(u / v)) for u, v in zip(*found, strict=True)]
    assert min(slopes) >= order - 0.3, slopes


def test_the_adjoint_of_order_2_is_heuns_method_also_where_steps_grow():
    """Written out in rho: on uniform t the steps grow towards the noise, where slopes must not be extrapolated."""
    law, x = processes.VP(), normal(5, 3).requires_grad_()
    denoiser = sf.parametrized(network(), law, "eps")
    ctx, weight = Context.of(5, 0, cond={"vector": normal(5, 4)}, dtype=DOUBLE), normal(5, 3, seed=4)
    options = {"solver": "ddim", "grid": "uniform", "steps": 6, "stop": 0.01}
    end = gradients.sample(denoiser, method=Adjoint(2, "rho"), x=x, cond=ctx.cond, parameters=(), **options)
    (found,) = torch.autograd.grad((end * weight).sum(), [x])

    run = list(sf.trajectory(denoiser, x=x.detach(), cond=ctx.cond, **options))[::-1]
    coefs = [law.coef(st.t) for st in run]
    rhos, states = [c.sigma / c.alpha for c in coefs], [st.x / c.alpha for st, c in zip(run, coefs, strict=True)]

    def slope(i, a):
        def eps(y):
            return denoiser(y * coefs[i].alpha, run[i].t, ctx).view("eps")

        return torch.autograd.functional.vjp(eps, states[i], a)[1]

    a = weight * coefs[0].alpha
    for i in range(len(run) - 1):
        step = rhos[i + 1] - rhos[i]
        here = slope(i, a)
        a = a - step / 2 * (here + slope(i + 1, a - step * here))
    assert torch.allclose(found, a / coefs[-1].alpha, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("store", [True, False])
def test_the_adjoint_of_a_guided_network_comes_near_backpropagation_for_all_arguments(store):
    options = {"solver": "heun", "grid": "uniform", "start": 0.8, "stop": 0.02}
    exact = derivatives(guided(), "checkpoint", steps=80, **options)[1]
    errors = [worst(derivatives(guided(), Adjoint(store=store), steps=n, **options)[1], exact) for n in (10, 20)]
    assert errors[1] < 5e-3 and errors[1] < errors[0] / 2.5


def test_the_adjoint_runs_from_pure_noise_to_clean_data_and_upwards():
    options = {"solver": "heun", "grid": "uniform"}
    for span in ({}, {"start": 0.1, "stop": 1.0}):
        exact = derivatives(guided(processes.Flow()), "checkpoint", steps=40, **options, **span)[1]
        assert worst(derivatives(guided(processes.Flow()), "adjoint", steps=40, **options, **span)[1], exact) < 5e-2


def test_weights_of_a_polynomial_are_exact():
    nodes = [0.3, 0.1, -0.4, -0.9]
    for degree in range(4):
        area = (0.8 ** (degree + 1) - 0.3 ** (degree + 1)) / (degree + 1)
        assert sum(w * y**degree for w, y in zip(lagrange(0.3, 0.8, nodes), nodes, strict=True)) == pytest.approx(area)


def test_memory_of_the_backward_pass_does_not_grow_with_the_steps():
    x, denoiser = torch.zeros(256, 3), sf.parametrized(network().float(), processes.VP(), "v")

    def peak(method, steps):
        with Memory() as used:
            y = x.clone().requires_grad_()
            gradients.sample(denoiser, method=method, solver="ddim", x=y, steps=steps).sum().backward()
        denoiser.zero_grad()
        return used.peak

    few, many = 4, 16
    assert peak("plain", many) > 3 * peak("plain", few)
    assert peak(Adjoint(store=False), many) < 1.05 * peak(Adjoint(store=False), few)
    for method in ("checkpoint", "adjoint"):
        assert peak(method, many) <= peak(method, few) + 2 * (many - few) * x.numel() * 4
    assert peak("checkpoint(store='sqrt')", many) < peak("checkpoint", many)


def test_the_context_counts_forward_calls_only_and_weights_may_be_left_out():
    denoiser, x = guided(), normal(2, 3).requires_grad_()
    ctx = Context.of(2, 0, cond={"vector": normal(2, 4)}, dtype=DOUBLE)
    end = gradients.sample(denoiser, x=x, ctx=ctx, steps=3, solver="ddim", parameters=())
    end.sum().backward()
    assert ctx.run.nfe == 6 and x.grad is not None
    assert all(p.grad is None for p in denoiser.parameters())


class Shifted(Wrapper):
    """Another tensor takes part."""

    def __init__(self, inner, shift):
        super().__init__(inner)
        self.shift = [shift]

    def forward(self, x, t, ctx):
        post = self.inner(x, t, ctx)
        return post.but(x0=post.mean + self.shift[0])


@pytest.mark.parametrize("method", ["checkpoint", "adjoint"])
def test_a_tensor_that_nobody_listed_is_an_error_and_a_listed_one_gets_its_gradient(method):
    shift = normal(3).requires_grad_()
    denoiser, options = (
        Shifted(guided(), shift),
        {"x": normal(2, 3), "cond": {"vector": normal(2, 4)}, "steps": 4, "stop": 0.1},
    )
    end = gradients.sample(denoiser, method=method, **options)
    with pytest.raises(InputError, match="parameters="):
        end.sum().backward()
    gradients.sample(denoiser, method=method, parameters=[shift], **options).sum().backward()
    assert shift.grad is not None and float(shift.grad.norm()) > 0


class Detached(Wrapper):
    def forward(self, x, t, ctx):
        post = self.inner(x.detach(), t, ctx)
        return Posterior(post.view("v").detach(), "v", x, post.coef)


class Counts(Wrapper):
    """Keeps a number outside the Context."""

    calls = 0

    def forward(self, x, t, ctx):
        self.calls += 1
        post = self.inner(x, t, ctx)
        return post.but(x0=post.mean * self.calls)


def test_runs_that_cannot_be_repeated_or_followed_are_refused():
    options = {"x": normal(2, 3).requires_grad_(), "cond": {"vector": normal(2, 4)}, "steps": 4}
    with pytest.raises(InputError, match="another state"):
        gradients.sample(Counts(guided()), **options).sum().backward()
    with pytest.raises(InputError, match="detach or no_grad"):
        gradients.sample(Detached(guided()), method="adjoint", **options).sum().backward()
    noisy = guided(net=nn.Sequential(network(), nn.Dropout(0.5)))
    with pytest.raises(InputError, match="training mode"):
        gradients.sample(noisy, **options)
    end = gradients.sample(guided(), **options)
    (g,) = torch.autograd.grad(end.square().sum(), options["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_weights_changed_between_the_passes_are_noticed():
    denoiser, x = guided(), normal(2, 3).requires_grad_()
    end = gradients.sample(denoiser, x=x, cond={"vector": normal(2, 4)}, steps=3)
    with torch.no_grad():
        next(denoiser.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adjoint", "solver": "ddpm"}, "draws noise"),
        ({"method": "adjoint(variable='lambda')"}, "variable"),
        ({"method": "adjoint(order=5)"}, "order"),
        ({"method": "checkpoint(store='some')"}, "store"),
        ({"x": None}, "shape="),
        ({"x": normal(2, 3), "shape": (2, 3)}, "not both"),
        ({"parameters": [normal(3)]}, "leaf tensors"),
        ({"parameters": ["weight"]}, "leaf tensors"),
        ({"steps": 0}, "whole number"),
        ({"ctx": Context.of(2, 0)}, "not both"),
    ],
)
def test_wrong_input_is_refused(options, message):
    given = {"x": normal(2, 3), "cond": {"vector": normal(2, 4)}, "steps": 4} | options
    with pytest.raises(InputError, match=message):
        gradients.sample(guided(), **given)


def test_rho_is_refused_where_alpha_vanishes_and_other_laws_name_the_way_out():
    x = normal(2, 3).requires_grad_()
    end = gradients.sample(
        guided(processes.Flow()), method=Adjoint(variable="rho"), x=x, cond={"vector": normal(2, 4)}, steps=4
    )
    with pytest.raises(InputError, match="angle"):
        end.sum().backward()
