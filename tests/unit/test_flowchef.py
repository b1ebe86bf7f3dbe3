"""FlowChef against its own algorithm box, against exact restorations, and as an edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato import core, grids, oracles, solvers
from sfumato.core import Context, InputError, trajectory
from sfumato.denoisers import parametrized
from sfumato.guidance import classifier, data_fit, flowchef
from sfumato.guidance.classifier import ClassCost
from sfumato.operators import Blur, Downsample, Fourier, Mask
from sfumato.processes import VP, Flow
from sfumato.steering import follow


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(n: int = 3, seed: int = 1) -> oracles.Empirical:
    """A kernel density of 40 smooth pictures of 8 x 8."""
    rough = torch.randn(40, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return oracles.Empirical(nn.functional.interpolate(rough, size=(8, 8), mode="bicubic").tanh(), 0.05)


OPERATORS = {
    "inpainting": Mask(hidden=0.4),
    "x2": Downsample(2),
    "blur": Blur(std=1.0),
    "fourier": Fourier(acceleration=2.0),
}


class Guarded(nn.Module):
    """A network through which nothing may be differentiated."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls = 0

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        return self.net(x) * (1 + label[:, None])


@pytest.mark.parametrize("kind", ["flow", "x0"])
def test_it_is_its_algorithm_box(kind):
    """x <- x - step A*(A x0 - y) with x0 = x - t v, then x <- x + dt v with the same v: one call a step, none backward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    guarded = Guarded(net)
    operator, y, step = Mask(torch.tensor([True, False, True, False])), normal(3, 4, seed=2), 0.6
    denoiser = flowchef(data_fit(operator, y), step)(parametrized(guarded, Flow(), kind))
    start = normal(3, 4, seed=3)
    ours = core.sample(denoiser, solvers.get("euler"), grids.get("uniform"), 8, x=start)
    assert guarded.calls == 8
    x, times = start, torch.linspace(1, 0, 9, dtype=torch.float64).tolist()
    with torch.no_grad():
        for t, s in zip(times, times[1:], strict=False):
            out = net(x) * (1 + t)
            v = out if kind == "flow" else (x - out) / t
            x0 = x - t * v
            x = x - step * operator.adjoint(operator(x0) - operator.restrict(y))
            x = x + (s - t) * v
    torch.testing.assert_close(ours, x)


class Straight(nn.Module):
    """The straight flow that carries x1 to c x1: v = (1 - c) x / (c (1 - t) + t)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (1 - C) * x / (C * (1 - t) + t)[:, None]


C = 0.4


def test_along_straight_paths_the_residual_shrinks_at_every_step_by_the_known_factor():
    """x0 = c / (c (1 - t) + t) x, so a step of size h leaves 1 - h c / (c (1 - s) + s) of the residual at the next time s."""
    operator, y, step, seen = Mask(torch.tensor([True, False, True, False])), normal(3, 4, seed=2), 0.5, []
    fit = data_fit(operator, y)

    def watched(x0: Tensor, cond: Any) -> Tensor:
        seen.append(operator.misfit(x0.detach(), y))
        return fit(x0, cond)

    guided = flowchef(watched, step)(parametrized(Straight(), Flow(), "flow"))
    x = core.sample(guided, solvers.get("ddim"), grids.get("uniform"), 10, x=normal(3, 4))
    misfits = torch.stack([*seen, operator.misfit(x, y)])
    assert (misfits[1:] < misfits[:-1]).all()
    times = torch.linspace(1, 0, 11, dtype=torch.float64)[1:]
    left = (1 - step * C / (C * (1 - times) + times)) ** 2
    torch.testing.assert_close(misfits[1:] / misfits[:-1], left[:, None].expand(-1, 3))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_end_fits_what_was_measured(name):
    operator, law = OPERATORS[name], images()
    truth = law.sample(4, seed=5)
    y = operator(truth)
    step = 0.5 if operator.tight is None else 0.5 / operator.tight
    denoiser = law.denoiser(Flow())
    options: dict[str, Any] = {"shape": truth.shape, "seed": 0, "dtype": torch.float64}
    guided = flowchef(data_fit(operator, y), step)(denoiser)
    out, free = (core.sample(d, solvers.get("ddim"), grids.get("uniform"), 24, **options) for d in (guided, denoiser))
    assert (operator.misfit(out, y) <= 0.02 * operator.misfit(free, y)).all()


@pytest.mark.parametrize("name", ["inpainting", "x2"])
def test_a_whole_step_satisfies_an_exact_measurement_to_round_off(name):
    operator, law = OPERATORS[name], images()
    y = operator(law.sample(4, seed=5))
    guided = flowchef(data_fit(operator, y), 1.0 / operator.tight)(law.denoiser(Flow()))
    for solver in (solvers.get("ddim"), follow(solvers.get("dpm-solver++")), solvers.get("ddpm")):
        out = core.sample(guided, solver, grids.get("uniform"), 6, shape=(4, 1, 8, 8), dtype=torch.float64)
        torch.testing.assert_close(operator(out), y, rtol=0, atol=1e-9)
    believed = [guided(st.x, st.t, Context.of(4)).mean for st in trajectory(
        guided, solvers.get("ddim"), grids.get("uniform"), 6, shape=(4, 1, 8, 8), dtype=torch.float64
    ) if st.t]  # fmt: skip
    for x0 in believed:
        torch.testing.assert_close(operator(x0), y, rtol=0, atol=1e-9)


def test_noise_is_not_fitted():
    """Guidance stops where the misfit is what the noise explains; the complex measurements count twice."""
    for operator in (Mask(hidden=0.4, noise=0.1), Fourier(acceleration=2.0, noise=0.1), Downsample(2, noise=0.1)):
        law = images()
        truth = law.sample(4, seed=5)
        y = operator.measure(truth, Context.of(4, 0, dtype=torch.float64))
        cost = data_fit(operator, y)
        numbers = (operator.misfit(truth, y) / 0.1**2).mean()
        assert abs(float(numbers) / cost._measured(truth) - 1) < 0.35
        exact = type(cost)(operator, operator(truth))
        x = (truth + 0.01).requires_grad_()
        (slope,) = torch.autograd.grad(exact(x, {}).sum(), x)
        assert not slope.any()


def test_items_do_not_meet_and_zero_steps_change_nothing():
    law, operator = images(), Mask(hidden=0.4)
    denoiser, y = law.denoiser(Flow()), operator(images().sample(3, seed=5))
    x = normal(3, 1, 8, 8)

    def end(rows: slice, **options: Any) -> Tensor:
        guided = flowchef(data_fit(operator, y[rows]), **options)(denoiser)
        return core.sample(guided, solvers.get("ddim"), grids.get("uniform"), 5, x=x[rows])

    for options in ({"step": 0.5}, {"step": 0.1, "iterations": 3, "optimizer": "adam"}, {"step": 0.3, "iterations": 2}):
        each = torch.cat([end(slice(i, i + 1), **options) for i in range(3)])
        torch.testing.assert_close(end(slice(0, 3), **options), each)
    plain = core.sample(denoiser, solvers.get("ddim"), grids.get("uniform"), 5, x=x)
    assert torch.equal(end(slice(0, 3), step=0.0), plain)
    torch.testing.assert_close(end(slice(0, 3), step=0.5, iterations=2), end(slice(0, 3), step=0.75))  # (1 - 1/2)^2
    single = flowchef(data_fit(operator, y.float()), 0.5)(denoiser)
    out = core.sample(single, solvers.get("ddim"), grids.get("uniform"), 5, x=x.float())
    torch.testing.assert_close(out.double(), end(slice(0, 3), step=0.5), rtol=0, atol=1e-3)


def test_adam_moves_every_entry_by_its_rate_first():
    denoiser = oracles.Gaussian([0.0, 0.0], 1.0).denoiser(Flow())
    cost = lambda x0, cond: (x0 - 3.0).square().sum(1)  # noqa: E731
    x = normal(2, 2)
    ours = flowchef(cost, 0.25, optimizer="adam")(denoiser)(x, 0.5, Context.of(2))
    plain = denoiser(x, 0.5, Context.of(2))
    torch.testing.assert_close(ours.mean, plain.mean + 0.25, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.view("flow"), plain.view("flow"))


def test_a_classifier_steers_the_flow_to_its_class():
    mixture = oracles.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.3 * torch.ones(2))
    clean = mixture.belief  # the exact class posterior of clean points
    assert clean is not None
    process = Flow()
    net = lambda x: mixture.classify(x, process.coef(0.2))  # noqa: E731
    guided = flowchef(ClassCost(net, 1), 0.1)(mixture.denoiser(process))
    options: dict[str, Any] = {"shape": (200, 2), "seed": 0, "dtype": torch.float64}
    out = core.sample(guided, solvers.get("ddim"), grids.get("uniform"), 20, **options)
    free = core.sample(mixture.denoiser(process), solvers.get("ddim"), grids.get("uniform"), 20, **options)
    assert 0.3 < (free[:, 0] > 0).double().mean() < 0.7
    assert (out[:, 0] > 0).double().mean() > 0.97
    skipped = classifier(net, 0.1, label=1, weight="constant", keep="flow")(mixture.denoiser(process))
    torch.testing.assert_close(
        core.sample(skipped, solvers.get("ddim"), grids.get("uniform"), 20, **options), out
    )  # it is a loss


def test_numbers_that_say_nothing_are_refused():
    denoiser = oracles.Gaussian([0.0, 0.0], 1.0).denoiser(Flow())
    cost = lambda x0, cond: x0.sum(1)  # noqa: E731
    for options, says in (
        ({"optimizer": "lbfgs"}, "optimizer"),
        ({"iterations": 0}, "iterations"),
        ({"keep": "mean"}, "keep"),
    ):
        with pytest.raises(InputError, match=says):
            flowchef(cost, **options)(denoiser)
    with pytest.raises(InputError, match="Adam takes one rate"):
        flowchef(cost, torch.ones(2), optimizer="adam")(denoiser)(normal(2, 2), 0.5, Context.of(2))


# -- the edit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji() -> Any:
    return sf.load("emoji-latent")


def pictures(n: int, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return small.repeat_interleave(size // 4, -1).repeat_interleave(size // 4, -2)


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++"])
def test_an_edit_keeps_what_lies_outside_the_mask(emoji, solver):
    """In the space of the process exactly: the last call puts the codes back."""
    from sfumato.editing import perform

    given = pictures(2)
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    options: dict[str, Any] = {"mask": mask, "steps": 4, "solver": solver, "source": "a red square"}
    found = perform(emoji, given, "a blue ball", method="flowchef", **options)
    code = emoji.codec.encode(given)
    inside = nn.functional.interpolate(mask[None, None], size=(8, 8), mode="area").bool()
    torch.testing.assert_close(*(torch.where(inside, 0.0, x) for x in (found.state, code)), rtol=0, atol=1e-4)
    assert (found.state - code)[inside.expand_as(code)].abs().mean() > 0.1
    alone = perform(emoji, given[:1], "a blue ball", method="flowchef", **options)
    torch.testing.assert_close(alone.state, found.state[:1], rtol=1e-3, atol=1e-3)
    assert found.nfe == 8  # both readings of the guidance at 4 steps


def test_an_edit_without_mask_is_held_until_a_time_and_draws_nothing_but_its_noise(emoji):
    from sfumato.editing import perform

    given = pictures(1)
    code = emoji.codec.encode(given)
    held, loose = (
        (perform(emoji, given, "a blue ball", method="flowchef", until=u, steps=6).state - code).abs().mean()
        for u in (0.2, 0.9)
    )
    assert held < 0.8 * loose
    with pytest.raises(InputError, match="mask="):
        sf.edit(emoji, given, "a blue ball", method="flowchef", steps=2)
    with pytest.raises(InputError, match="until"):
        sf.edit(emoji, given, "a blue ball", method="flowchef", until=1.0)


def test_the_edit_runs_on_curved_processes_too():
    digits = sf.load("digits")
    given = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    out = sf.edit(digits, given, cond={"y": "three"}, method="flowchef", mask=mask, steps=6)
    assert out.shape == given.shape and int((out[..., 4:].int() - given[..., 4:].int()).abs().max()) <= 1
    assert isinstance(digits.process, VP)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_diffusers_pipeline_is_edited(kind):
    pytest.importorskip("diffusers")
    from sfumato.editing import perform
    from sfumato.interop import tiny

    pipe = sf.from_diffusers(tiny.pipeline(kind))
    given = pictures(1, pipe.size[0])
    mask = torch.zeros(pipe.size)
    mask[: pipe.size[0] // 2] = 1
    found = perform(pipe, given, "ab", method="flowchef", source="cd", mask=mask, steps=3, guidance=2.0)
    code = pipe.codec.encode(given)
    kept = nn.functional.interpolate(mask[None, None], size=code.shape[-2:], mode="area") == 0
    left = pipe.process.coef(pipe.grid(pipe.process, 3, 1.0, 0.0)[-1].item()).sigma  # where the released sampler ends
    kept = kept.expand_as(code)
    torch.testing.assert_close(found.state[kept], code[kept], rtol=0, atol=1e-4 + 5 * left)
    assert found.images.shape == given.shape
