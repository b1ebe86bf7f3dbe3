"""The examples of CONTRIBUTING.md do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sfumato as sf
from sfumato import recipes, solvers

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
EXAMPLES = dict(
    zip(
        ("solver", "guidance", "acceleration", "recipe"),
        re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL),
        strict=True,
    )
)


@pytest.fixture
def example(monkeypatch):
    """Run an example as a module of its own, and forget what it registered."""
    solvers.names()
    monkeypatch.setattr(solvers.registry, "_made", dict(solvers.registry._made))
    monkeypatch.setattr(recipes._base, "_made", dict(recipes._base._made))
    sf.acceleration.names()
    monkeypatch.setattr(sf.acceleration.registry, "_made", dict(sf.acceleration.registry._made))

    def call(name: str) -> dict:
        space: dict = {"__name__": f"example_{name}"}
        exec(compile(EXAMPLES[name], f"CONTRIBUTING.md: {name}", "exec", dont_inherit=True), space)
        return space

    return call


def mixture():
    return sf.oracles.GaussianMixture(means=[[-2.0, 0.0], [2.0, 1.0]], stds=[[0.3, 0.6], [0.5, 0.4]])


def test_the_solver_is_registered_and_of_second_order(example):
    example("solver")
    assert "midpoint-rule" in sf.solvers.names()
    denoiser = mixture().denoiser(sf.processes.VP())
    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = {
        n: sf.sample(denoiser, solver="midpoint-rule", grid="uniform", steps=n, x=noise, stop=0.1)
        for n in (40, 80, 160)
    }
    coarse, fine = ((path[n] - path[2 * n]).norm(dim=1) for n in (40, 80))
    assert 1.7 < float((coarse / fine).log2().median()) < 2.3


def test_the_acceleration_does_less_and_is_the_network_where_it_does_nothing(example):
    example("acceleration")
    assert "shortened" in sf.acceleration.names()
    net = sf.networks.DiT(2, size=8, width=32, depth=3, heads=2)
    torch.manual_seed(0)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    pipe = sf.Pipeline(sf.parametrized(net.eval(), sf.processes.Flow(), "flow"), sf.codecs.Identity(), size=(8, 8))

    def drawn(spec: str) -> torch.Tensor:
        return sf.sample(pipe.accelerated(spec).denoiser, solver="ddim", steps=4, shape=(2, 2, 8, 8), seed=0)

    plain = sf.sample(pipe.denoiser, solver="ddim", steps=4, shape=(2, 2, 8, 8), seed=0)
    spec = "shortened(until={}, path='blocks.2')"
    assert torch.equal(drawn(spec.format(1.0)), plain) and not torch.equal(drawn(spec.format(0.5)), plain)
    work = sf.acceleration.operations
    assert work(lambda: drawn(spec.format(0.5))) < work(lambda: drawn(spec.format(1.0)))


def test_the_guidance_keeps_its_bound_with_every_solver_and_composes(example):
    clipped = example("guidance")["clipped"]
    denoiser = mixture().denoiser(sf.processes.VP())
    plain = sf.sample(denoiser, shape=(200, 2), dtype=torch.float64)
    assert plain.abs().max() > 1.5
    for solver in ("ddim", "ddpm", "heun", "dpm-solver++"):
        assert (
            sf.sample(clipped(1.5)(clipped(1.0)(denoiser)), solver=solver, shape=(50, 2), steps=20).abs().max()
            <= 1.0 + 1e-5
        )


def test_the_recipe_holds_on_seeds_that_nobody_tried(example):
    made = example("recipe")["run"]
    found = [made.run(seed=seed) for seed in (1, 23, 456)]
    assert all(evidence.holds for evidence in found) and found[0].checks[0].ours != found[1].checks[0].ours
    assert made.title == recipes.about("dpm-solver-pp").title
