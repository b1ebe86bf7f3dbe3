"""Recorded noise: exact replay with any solver that draws once, the two paths, what maps are made of, and their changes."""

from __future__ import annotations

import pytest
import torch
from tiny_inversion import images, tiny
from torch import Tensor, nn

import sfumato as sf
from sfumato import editing, grids, oracles, solvers
from sfumato.core import Context, InputError, Posterior
from sfumato.denoisers import parametrized
from sfumato.editing.methods.recorded import CycleDiffusion, EditFriendly
from sfumato.editing.recorded import record
from sfumato.guidance import cfg
from sfumato.processes import EDM, VP, Cosine, Flow

LAWS = {"vp": VP(), "flow": Flow(), "edm": EDM(), "cosine": Cosine()}
ONCE = ["ddpm", "ddpm(eta=0.1)", "dpm-solver++(order=2, eta=1.0)", "dpm-solver++sde", "sa-solver", "euler-maruyama"]
MIXTURE = oracles.GaussianMixture([[-1.2, 0.3], [0.9, 0.9], [0.5, -1.1]], [[0.35, 0.2], [0.25, 0.45], [0.5, 0.3]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.vector = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(3, 8)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)

    def forward(self, x: Tensor, label: Tensor, vector: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.cat([x, label[:, None]], 1)) + self.vector(vector)))


def guided(process, dtype=torch.float64):
    net = parametrized(Net().to(dtype), process, "v", null={"vector": torch.zeros(3, dtype=dtype)})
    return cfg(7.0)(net)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("path", ["independent", "posterior"])
@pytest.mark.parametrize("solver", ONCE)
def test_replay_reconstructs_exactly(solver, path, law):
    """Guidance 7, 20 steps or 8, on a network never trained: to the last bit in float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        x0, cond = normal(4, 2, seed=1).to(dtype), {"vector": normal(4, 3, seed=2).to(dtype)}
        for steps, start in ((20, 1.0), (8, 0.7)):
            options = {"solver": solver, "steps": steps, "path": path, "start": start, "cond": cond}
            maps = record(guided(LAWS[law], dtype), x0, **options)
            back = maps.decode(guided(LAWS[law], dtype), cond=cond)
            assert back.dtype == dtype and (back - x0).abs().max() <= 4 * torch.finfo(dtype).eps * x0.abs().max()
            other = maps.decode(guided(LAWS[law], dtype), cond={"vector": -cond["vector"]})
            assert (other - x0).abs().max() > 1e-3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_maps_are_the_noise_of_the_kernel(law, eta):
    """z_t = kernel.noise(x_s), and each state is mean + std z of the one before."""
    process = LAWS[law]
    denoiser = MIXTURE.denoiser(process)
    maps = record(denoiser, MIXTURE.sample(3), solver=f"ddpm(eta={eta})", steps=6, start=0.9, grid="uniform")
    for t, s, x, there, z, missing in zip(
        maps.times[:-1], maps.times[1:], maps.states[:-1], maps.states[1:], maps.noise, maps.missing, strict=True
    ):
        kernel = process.kernel(x, denoiser(x, t, Context.of(3, None)), t, s, eta)
        if missing is None:
            assert torch.allclose(z, kernel.noise(there), rtol=1e-6, atol=1e-8)
            assert torch.allclose(there, kernel.draw(z))
        else:
            assert s == 0 and torch.allclose(missing, there - kernel.mean) and not z.any()


def test_the_path_of_the_encoder_has_standard_normal_maps_and_the_independent_one_has_not():
    """An exact belief about data of one kind: chain maps are white, independent ones larger and falling together."""
    distribution = oracles.Gaussian(torch.zeros(4), 0.5 * torch.eye(4) + 0.5)
    denoiser, x0 = distribution.denoiser(VP()), distribution.sample(500)
    options = {"steps": 100, "grid": "uniform"}
    chain, free = (record(denoiser, x0, path=path, **options).statistics() for path in ("posterior", "independent"))
    inner = slice(15, 70)  # where a step is small beside the noise that is there
    assert (chain["std"][inner] - 1).abs().max() < 0.15 and chain["correlation"][inner].abs().max() < 0.1
    assert free["std"][inner].min() > 1.2 and free["correlation"][inner].max() < -0.2


def test_the_chain_is_the_posterior_given_both_ends():
    """q(x_s | x_t, x0): mean and std over many draws, at eta 1 the textbook's."""
    process, t, s = VP(), 0.6, 0.4
    x0, xt = torch.full((4000, 1), 0.7).double(), torch.full((4000, 1), -0.4).double()
    from sfumato.editing.recorded import posterior

    a, b = process.coef(t), process.coef(s)
    for eta in (0.2, 1.0):
        drawn = posterior(process, x0, xt, t, s, eta, Context.of(4000, 3, dtype=torch.float64))
        kernel = process.kernel(xt, Posterior(x0, "x0", xt, a), t, s, eta)
        assert drawn.mean() == pytest.approx(float(kernel.mean[0]), abs=4 * float(kernel.std) / 60)
        assert drawn.std() == pytest.approx(float(kernel.std), rel=0.05)
    ratio = a.alpha / b.alpha
    assert kernel.std**2 == pytest.approx(b.sigma**2 / a.sigma**2 * (1 - ratio**2), rel=1e-9)


def test_items_do_not_depend_on_the_batch_and_seeds_decide():
    denoiser, x0 = MIXTURE.denoiser(Flow()), MIXTURE.sample(4)
    four, again, other = (record(denoiser, x0, steps=5, seed=seed) for seed in (1, 1, 2))
    two = record(denoiser, x0[:2], steps=5, seed=1)
    for a, b, c, d in zip(four.noise, two.noise, again.noise, other.noise, strict=True):
        assert torch.allclose(a[:2], b, atol=1e-10) and torch.equal(a, c)
        assert not a.any() or not torch.allclose(a, d)


def test_skipping_steps_begins_on_the_way():
    denoiser, x0 = MIXTURE.denoiser(Cosine()), MIXTURE.sample(3)
    maps = record(denoiser, x0, steps=8)
    less = maps.skip(5)
    assert len(less.noise) == 3 and torch.equal(less.states[0], maps.states[5]) and less.times == maps.times[5:]
    assert torch.equal(less.decode(denoiser), x0)
    for steps in (-1, 8):
        with pytest.raises(InputError, match="fewer than the 8 steps"):
            maps.skip(steps)


def test_rolled_maps_draw_the_rolled_picture():
    """A belief that knows of no position: everything but the new edge is the picture, moved."""
    denoiser = oracles.Gaussian(torch.zeros(36), 0.3 * torch.eye(36)).denoiser(Flow())

    class Flat(sf.core.Wrapper):
        def forward(self, x, t, ctx):
            post = self.inner(x.flatten(1), t, ctx)
            return Posterior(post.mean.view_as(x), "x0", x, self.process.coef(t))

    x0 = normal(2, 1, 6, 6)
    maps = record(Flat(denoiser), x0, steps=6)
    for down, right in ((2, 0), (-1, 3), (0, 0)):
        y = maps.roll(down, right, seed=4).decode(Flat(denoiser))
        rows, columns = slice(max(down, 0), 6 + min(down, 0)), slice(max(right, 0), 6 + min(right, 0))
        moved = torch.roll(x0, (down, right), (-2, -1))
        assert torch.allclose(y[..., rows, columns], moved[..., rows, columns], atol=1e-10)
        if down:
            assert not torch.allclose(y[..., : max(down, 0), :], moved[..., : max(down, 0), :]) or down < 0


def test_only_the_last_step_misses_anything_and_it_may_be_left_out():
    denoiser, x0 = MIXTURE.denoiser(VP()), MIXTURE.sample(3)
    maps = record(denoiser, x0, steps=7)
    assert [m is None for m in maps.missing] == [True] * 6 + [False]
    assert not torch.allclose(maps.decode(denoiser, keep_last=False), x0)


def test_a_second_model_decodes_and_another_process_is_refused():
    """Two beliefs, one noise: the picture moves to where the other model draws."""
    near, far = (
        oracles.Gaussian(torch.zeros(2), 0.2 * torch.eye(2)),
        oracles.Gaussian(torch.full((2,), 5.0), 0.2 * torch.eye(2)),
    )
    x0 = near.sample(500)
    maps = record(near.denoiser(VP()), x0, steps=30, path="posterior", solver="ddpm(eta=1.0)")
    y = maps.decode(far.denoiser(VP()), keep_last=False)
    assert (y.mean(0) - 5).abs().max() < 0.1
    shared = torch.corrcoef(torch.stack([(y - y.mean(0)).flatten(), (x0 - x0.mean(0)).flatten()]))[0, 1]
    assert shared > 0.8
    with pytest.raises(InputError, match="another process"):
        maps.decode(far.denoiser(Flow()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "ddim"}, "draws no noise"),
        ({"solver": "edm"}, "after it has drawn"),
        ({"solver": "pc"}, "times a step"),
        ({"solver": "heun-ancestral"}, "after it has drawn"),
        ({"path": "chain"}, "one of independent"),
    ],
)
def test_what_cannot_be_recorded_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        record(MIXTURE.denoiser(VP()), MIXTURE.sample(2), steps=5, **options)


def test_replay_on_other_times_is_refused():
    denoiser, x0 = MIXTURE.denoiser(VP()), MIXTURE.sample(2)
    maps = record(denoiser, x0, steps=5)
    ctx = Context.of(2, None, dtype=torch.float64, source=maps.source)
    with pytest.raises(InputError, match="on the times of the record"):
        sf.core.sample(denoiser, solvers.get("ddpm"), grids.get("uniform"), 5, x=x0, start=0.9, ctx=ctx)


@pytest.mark.parametrize("law", ["cosine", "flow"])
@pytest.mark.parametrize("method", [EditFriendly(source_guidance=None), CycleDiffusion(source_guidance=None)])
def test_edits_return_the_picture_that_is_asked_for_again(method, law):
    pipe, options = tiny(LAWS[law]), {"source": "noto", "method": method, "steps": 8}
    x0 = pipe.codec.encode(images())
    for more in ({}, {"solver": "dpm-solver++(order=2, eta=1.0)"}):
        same = editing.perform(pipe, images(), "noto", guidance=7.0, **options, **more)
        assert (same.state - x0).abs().max() < 1e-12 and same.nfe == 4 * max(1, round(8 * method.strength))
        other = editing.perform(pipe, images(), "twemoji", guidance=7.0, **options, **more)
        assert (other.state - x0).abs().max() > 0.05


def test_a_second_denoiser_may_explain_the_picture():
    pipe, other = tiny(LAWS["flow"]), tiny(LAWS["flow"])
    with torch.no_grad():
        for p in other.denoiser.parameters():
            p.mul_(1.1)
    options = {"source": "noto", "steps": 6, "guidance": 1.0}
    same = sf.edit(pipe, images(), "noto", method=CycleDiffusion(model=pipe.denoiser), **options)
    assert torch.equal(same, sf.edit(pipe, images(), "noto", method="cycle-diffusion", **options))
    assert not torch.equal(
        same, sf.edit(pipe, images(), "noto", method=CycleDiffusion(model=other.denoiser), **options)
    )


@pytest.mark.parametrize(
    ("method", "solver", "said"),
    [("edit-friendly(eta=0.0)", None, "no noise to record"), ("cycle-diffusion(strength=2.0)", None, "at most 1"),
     ("edit-friendly", "heun", "draws no noise"), ("edit-friendly", "edm", "after it has drawn")],
)  # fmt: skip
def test_bad_numbers_and_solvers_of_edits(method, solver, said):
    with pytest.raises(InputError, match=said):
        sf.edit(tiny(LAWS["cosine"]), images(), "noto", source="noto", method=method, solver=solver, steps=5)
