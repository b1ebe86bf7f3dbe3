"""Adversarial denoising and time-aware distillation, on Gaussians that are known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import grids, networks, oracles, solvers
from sfumato.core import Context, Denoiser, InputError, Posterior, linear, sample
from sfumato.denoisers import parametrized
from sfumato.networks import MLP, DiT, PairCritic, UNet, with_latent
from sfumato.networks.critics import FeatureCritic
from sfumato.objectives.distill import DenoisingGAN, TimeAware
from sfumato.objectives.times import Uniform
from sfumato.processes import VP, ResidualShift

F64 = torch.float64
MEAN, VARIANCES = torch.tensor([0.6, -0.3], dtype=F64), torch.tensor([1.0, 0.01], dtype=F64)


def law() -> oracles.Gaussian:
    return oracles.Gaussian(MEAN, VARIANCES)


class Draws(nn.Module):
    """The exact sampler of q(x0 | x_t): its belief is moved by the latent that it is told."""

    draws = {"latent": (2,)}

    def forward(self, x: Tensor, label: Tensor, *, latent: Tensor) -> Tensor:
        c = VP().coef(float(label[0]))
        spread = (VARIANCES * c.sigma**2 / (c.alpha**2 * VARIANCES + c.sigma**2)).sqrt()
        return law().belief(x, c)[0] + spread * latent


def test_four_steps_of_a_generator_that_draws_from_the_posterior_have_the_law_of_the_data() -> None:
    """'ddpm' on the coarse times of the objective is the ancestral sampler; with the posterior's mean it is not enough."""
    n, times = 6000, grids.fixed([1.0, 0.75, 0.5, 0.25, 0.0])
    c = VP().coef(1.0)
    x = c.alpha * law().sample(n, seed=1) + c.sigma * law().sample(n, seed=2).sub(MEAN).div(VARIANCES.sqrt())

    def variances(denoiser: Denoiser) -> Tensor:
        return sample(denoiser, solvers.get("ddpm"), times, 4, x=x, seed=3).var(0)

    torch.testing.assert_close(
        variances(parametrized(Draws(), VP(), "x0")) / VARIANCES, torch.ones(2, dtype=F64), atol=0.08, rtol=0
    )
    assert (variances(law().denoiser(VP())) / VARIANCES).min() < 0.9


def test_a_latent_is_drawn_at_each_call_for_each_item_and_is_the_same_in_its_stacked_rows() -> None:
    x, ctx = torch.zeros(3, 2, dtype=F64), Context.of(3, 7, dtype=F64)
    drawing = parametrized(Draws(), VP(), "x0")
    first, second = (drawing(x, 0.5, ctx).mean for _ in range(2))
    assert not torch.equal(first, second)
    ctx.rng.at(0)  # type: ignore[union-attr]
    torch.testing.assert_close(drawing(x, 0.5, ctx).mean, first)
    alone = Context(rng=Context.of(3, 7).rng.select([1]), dtype=F64, batch=1)  # type: ignore[union-attr]
    torch.testing.assert_close(drawing(x[:1], 0.5, alone).mean[0], first[1])
    ctx.rng.at(0)  # type: ignore[union-attr]
    stacked = drawing(torch.cat([x, x]), 0.5, ctx).mean
    torch.testing.assert_close(stacked, torch.cat([first, first]))
    told = drawing(x, 0.5, ctx.fork(cond={"latent": torch.zeros(3, 2, dtype=F64)})).mean
    torch.testing.assert_close(told, law().denoiser(VP())(x, 0.5, ctx).mean)


def test_a_network_that_is_told_a_latent_begins_as_it_was_and_is_rebuilt_from_its_name() -> None:
    for net, vector in (
        (UNet(1, width=16, multipliers=(1, 2), blocks=1, attention=False, embeddings={"y": 3}), None),
        (UNet(1, width=16, multipliers=(1, 2), blocks=1, attention=False, vector_channels=6), torch.randn(2, 6)),
        (DiT(1, size=8, width=16, depth=1, heads=2), None),
    ):
        for p in net.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        wider: Any = with_latent(net, 5, width=8)
        x, label, z = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 5)
        told = {} if vector is None else {"vector": vector}
        torch.testing.assert_close(wider(x, label, latent=z, **told), net(x, label, **told))
        nn.init.normal_(wider.project.weight)
        said = wider(x, label, latent=z, **told)
        assert (said - net(x, label, **told)).abs().max() > 1e-3
        again = networks.build(wider.network_name, wider.config)
        again.load_state_dict(wider.state_dict())
        torch.testing.assert_close(again(x, label, latent=z, **told), said)
        with pytest.raises(InputError, match="the latent is none"):
            wider(x, label)
    with pytest.raises(InputError, match="takes no vector"):
        with_latent(nn.Linear(2, 2), 3)


def test_attention_has_the_second_gradient_that_the_penalty_needs() -> None:
    torch.manual_seed(0)
    critic = PairCritic(
        UNet(2, 1, width=16, multipliers=(1, 2), blocks=1, attention=True, heads=2, embeddings={"y": 3})
    )
    for p in critic.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    generator = parametrized(with_latent(UNet(1, width=16, multipliers=(1,), blocks=1, attention=False), 3), VP(), "v")
    objective = DenoisingGAN(generator, critic, [1.0, 0.5, 0.0], r1=1.0, lazy=1)
    items = {"x": torch.randn(4, 1, 8, 8), "cond": {}}
    loss = objective(items, Context.of(4, 0), "critic")
    loss.total.backward()
    assert loss.terms["slope"] > 0 and critic.net.input.weight.grad.abs().max() > 0  # type: ignore[union-attr]
    told = {**items, "cond": {"y": torch.tensor([0, 1, 2, 0])}}
    other = {**items, "cond": {"y": torch.tensor([1, 1, 2, 0])}}
    generator.reads = None  # not told of classes here
    generator.net.forward = lambda x, label, latent=None, y=None: 0 * x  # type: ignore[method-assign]
    first, second = (objective(v, Context.of(4, 0), "critic").total for v in (told, other))
    assert (first - second).abs() > 1e-6  # the critic is told what the pair is of


class Ends(Denoiser):
    """A student that says where a rule ends."""

    def __init__(self, process: Any, rule: Any) -> None:
        super().__init__()
        self.process, self.rule = process, rule
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        return Posterior(self.rule(x, ctx) + 0 * self.weight, "x0", x, self.process.coef(t))


def batch(n: int = 32) -> dict[str, Any]:
    x = law().sample(n, seed=4)
    return {"x": x, "cond": {"anchor": x + 0.1}}


def context(n: int = 32) -> Context:
    return Context.of(n, 5, dtype=F64)


def run(x: Tensor, ctx: Context, steps: int = 15) -> Tensor:
    """The teacher's deterministic run."""
    inner = Context.of(len(x), None, cond=ctx.cond, dtype=F64)
    return sample(law().denoiser(ResidualShift()), solvers.get("ddim"), grids.get("uniform"), steps, x=x, ctx=inner)


def anchored(x: Tensor, ctx: Context) -> Tensor:
    """The same from the solver's coordinates."""
    return run(linear(1.0, x, 1.0, ResidualShift().anchor(1.0, ctx.cond)), ctx)


def test_a_student_that_ends_where_the_teachers_run_ends_has_no_loss() -> None:
    process = ResidualShift()
    objective = TimeAware(Ends(process, anchored), law().denoiser(process))
    loss = objective(batch(), context())
    assert set(loss.terms) == {"end", "detail"} and loss.total < 1e-20
    assert TimeAware(Ends(process, anchored), law().denoiser(process), steps=3)(batch(), context()).total > 1e-4
    made = objective._pair(batch(), context().fork(cond=batch()["cond"]), wanted=True)
    stored = {**batch(), "states": torch.stack(made, 1)}
    assert TimeAware(Ends(process, anchored), law().denoiser(process), steps=0)(stored, context()).total < 1e-20


@pytest.mark.parametrize("t", [0.05, 0.2, 0.9])
def test_the_second_term_is_the_difference_seen_through_the_teachers_gain(t: float) -> None:
    """For Gaussian data T(y_t) - T(x0'_t) = alpha^2 v / (alpha^2 v + sigma^2) (y - x0') in each direction, whatever the noise."""
    process, shift = ResidualShift(), torch.tensor([0.3, 0.2], dtype=F64)
    student = Ends(process, lambda x, ctx: anchored(x, ctx) + shift)
    loss = TimeAware(student, law().denoiser(process), levels=Uniform(t, t + 1e-9))(batch(), context())
    c = process.coef(t)
    gain = c.alpha**2 * VARIANCES / (c.alpha**2 * VARIANCES + c.sigma**2)
    assert float(loss.terms["detail"]) == pytest.approx(float((gain * shift).square().mean()), rel=1e-4)
    assert float(loss.terms["end"]) == pytest.approx(float(shift.square().mean()))


def test_small_times_see_fine_directions_and_large_ones_do_not() -> None:
    """The share of an error along the thin direction that reaches the loss, over that along the wide one."""
    process = ResidualShift()

    def share(low: float, high: float) -> float:
        found = []
        for direction in torch.eye(2, dtype=F64):
            student = Ends(process, lambda x, ctx, d=direction: anchored(x, ctx) + d)
            found.append(
                float(
                    TimeAware(student, law().denoiser(process), levels=Uniform(low, high))(batch(), context()).terms[
                        "detail"
                    ]
                )
            )
        return found[1] / found[0]

    assert share(0.001, 1 / 3) > 20 * share(2 / 3, 1.0)


def network() -> Any:
    torch.manual_seed(0)
    net = UNet(1, width=16, multipliers=(1, 2), blocks=1, attention=False, extra_channels=1)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return parametrized(net, ResidualShift(), "x0")


def test_the_critic_reads_frozen_features_and_its_gradient_reaches_the_student_alone() -> None:
    teacher, student = network(), network()
    critic = FeatureCritic([32], width=16)
    objective = TimeAware(student, teacher, critic, paths=["level.deep.deep"], steps=2)
    x = torch.randn(4, 1, 8, 8)
    items = {"x": x, "cond": {"anchor": x.flip(3), "image": x.flip(3)}}
    assert objective.turns(0) == [["critic"], ["student"]] and set(objective.players()) == {"student", "critic"}
    first = objective(items, Context.of(4, 0), "critic").total
    assert float(first.detach()) == pytest.approx(2.0)  # hinges of a logit of 0
    first.backward()
    assert critic.heads[0].output.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in student.parameters())
    with torch.no_grad():
        for p in critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
    loss = objective(items, Context.of(4, 0), "student")
    fool = torch.autograd.grad(loss.total, list(student.parameters()), retain_graph=True, allow_unused=True)
    plain = TimeAware(student, teacher, critic, paths=["level.deep.deep"], steps=2, adversarial=0.0)
    other = torch.autograd.grad(
        plain(items, Context.of(4, 0), "student").total, list(student.parameters()), allow_unused=True
    )
    gaps = [float((a - b).abs().max()) for a, b in zip(fool, other, strict=True) if a is not None and b is not None]
    assert max(gaps) > 1e-6 and all(p.grad is None for p in teacher.parameters())


def test_mistakes_are_named() -> None:
    teacher = law().denoiser(ResidualShift())
    with pytest.raises(InputError, match="together"):
        TimeAware(Ends(ResidualShift(), anchored), teacher, paths=["level.deep.deep"])
    with pytest.raises(InputError, match="not below 0"):
        TimeAware(Ends(ResidualShift(), anchored), teacher, detail=-1.0)
    with pytest.raises(InputError, match="states"):
        TimeAware(Ends(ResidualShift(), anchored), teacher, steps=0)(batch(), context())
    with pytest.raises(InputError, match="anchor"):
        TimeAware(Ends(ResidualShift(), anchored), teacher)({"x": batch()["x"]}, context())
    net = parametrized(with_latent(MLP(2), 3), VP(), "x0")
    with pytest.raises(InputError, match="streams"):
        net(torch.zeros(2, 2), 0.5, Context.of(2, None))
