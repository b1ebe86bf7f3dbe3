"""Regional energies: moves that are exact, gradients that stay in their region, and steerings that change nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_text import lively
from tiny_text import text_unet as unet

import sfumato as sf
from sfumato import editing, grids, networks, solvers
from sfumato.codecs import build
from sfumato.core import Context, InputError, trajectory
from sfumato.denoisers.features import features
from sfumato.editing.methods.diffeditor import DiffEditor, Memory, RegionalNoise, TimeTravel, decoder_paths
from sfumato.editing.regions import Move, alike, centre_of, disc, fitted, mean_in, unlike
from sfumato.guidance import cfg
from sfumato.guidance.energies import Energetic, Term, energies

N, SIDE = 2, 8


def dit() -> torch.nn.Module:
    torch.manual_seed(0)
    return lively(
        networks.build(
            "dit", {"channels": 2, "size": SIDE, "patch": 1, "width": 16, "depth": 4, "heads": 2, "context_channels": 8}
        )
    )


def task(net: torch.nn.Module | None = None, process: Any = None, **fields: Any) -> editing.Task:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(N, 2, SIDE, SIDE, generator=generator).double() * 0.5
    mask = torch.zeros(N, 1, SIDE, SIDE)
    mask[..., 1:4, 1:4] = 1
    cond = {"text": torch.randn(N, 5, 8, generator=generator).double(), "text_mask": torch.ones(N, 5, dtype=torch.bool)}
    denoiser = sf.parametrized(
        net or unet(), process or sf.processes.Flow(), "v", null={"text": 0.0, "text_mask": False}
    )
    facts: dict[str, Any] = {
        "denoiser": denoiser, "codec": build("identity", {"channels": 2}), "x0": x0, "images": torch.zeros(N, 3, SIDE, SIDE),
        "source": cond, "target": cond, "guidance": cfg(2.0), "scale": 2.0, "solver": solvers.get("ddim"),
        "grid": grids.get("uniform"), "steps": 5, "mask": mask, "points": ((2.0, 2.0, 5.0, 2.0),),
        "given": frozenset({"source", "mask", "points"}),
    }  # fmt: skip
    return editing.Task(**facts | fields)


COPY = DiffEditor(scale=0.0, noise=0.0, repeats=0, bank=False)


def test_whole_cells_move_exactly() -> None:
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    move = Move(torch.tensor([[2 / 6, 1 / 8], [-1 / 6, 0.0]]), torch.full((2, 2), 0.5))
    for mode in ("bilinear", "nearest"):
        got = move(x, mode)
        torch.testing.assert_close(got[0, :, 1:, 2:], x[0, :, :-1, :-2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1, :, :, :-1], x[1, :, :, 1:], rtol=1e-5, atol=1e-5)
        assert not got[0, :, 0].any() and not got[1, :, :, -1].any()
    torch.testing.assert_close(Move(torch.zeros(2), torch.zeros(2))(x), x, rtol=1e-5, atol=1e-5)


def test_a_resize_keeps_its_centre() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:8, 6:10] = 1
    centre = centre_of(mask)
    torch.testing.assert_close(centre, torch.tensor([[0.5, 0.375]]))
    big = (Move(torch.zeros(2), centre, 2.0)(mask) > 0.5).float()
    torch.testing.assert_close(centre_of(big), centre)
    assert big.sum() == 4 * mask.sum()
    there = Move(torch.tensor([0.125, 0.25]), centre, 2.0)(mask)
    torch.testing.assert_close(centre_of(there), centre + torch.tensor([0.125, 0.25]), rtol=1e-4, atol=1e-4)


def test_energies_of_regions() -> None:
    f = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.zeros(2, 1, 4, 4).double()
    mask[0, :, :2] = 1
    torch.testing.assert_close(alike(f, 3 * f), torch.ones(2, 1, 4, 4).double())
    torch.testing.assert_close(alike(f, -f), torch.zeros(2, 1, 4, 4).double())
    torch.testing.assert_close(mean_in(f, mask)[0], f[0, :, :2].mean((1, 2)))
    got = unlike(mean_in(alike(f, f), mask)[:, 0], mask)
    torch.testing.assert_close(got, torch.tensor([0.2, 0.0]).double())  # an empty region says nothing
    assert disc((3, 3), 1, (8, 8)).sum() == 5


def test_gradients_stay_in_their_region() -> None:
    asked = task()
    region = torch.zeros(N, 1, SIDE, SIDE)
    region[..., :4] = 1
    aim = torch.randn(N, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).double()
    term = Term(lambda found, t: (found["level.up"] - aim).square().mean((1, 2, 3)), region)
    guided = energies([term], ["level.up"], estimator=asked.denoiser, scale=1e3, limit=10.0)(asked.denoiser)
    post, plain = guided(asked.x0, 0.5, asked.context()), asked.denoiser(asked.x0, 0.5, asked.context())
    moved = (post.mean - plain.mean).abs().amax(1)
    assert moved[..., :4].min() > 0 and moved[..., 4:].max() < 1e-10
    torch.testing.assert_close(post.view("eps"), plain.view("eps"), rtol=1e-9, atol=1e-9)  # the direction stays

    coef = asked.process.coef(0.5)
    with torch.enable_grad():
        x = asked.x0.clone().requires_grad_()
        found = features(asked.denoiser, x, 0.5, asked.context(), ["level.up"])[1]
        (slope,) = torch.autograd.grad(term.energy(found, 0.5).sum(), x)
    want = plain.mean - coef.sigma / coef.alpha * 1e3 * SIDE**2 / 64**2 * region * slope
    torch.testing.assert_close(post.mean, want, rtol=1e-8, atol=1e-8)


def test_the_push_is_limited_and_stops() -> None:
    asked = task()
    term = Term(lambda found, t: found["level.up"].square().mean((1, 2, 3)), torch.ones(N, 1, 1, 1))
    strong = Energetic(asked.denoiser, [term], ["level.up"], asked.denoiser, 1e9, 0.5, 0.2, 0.6)
    ctx, c = asked.context(), asked.process.coef(0.5)
    post, plain = strong(asked.x0, 0.5, ctx), asked.denoiser(asked.x0, 0.5, ctx)
    push = (plain.mean - post.mean) * c.alpha / c.sigma
    sizes = [v.flatten(1).square().mean(1).sqrt() for v in (push, plain.view("eps"))]
    torch.testing.assert_close(sizes[0], 0.5 * sizes[1], rtol=1e-6, atol=1e-6)
    ctx.run.total = 10
    acts = []
    for ctx.run.step in range(10):
        acts.append(strong.acts(ctx))
    assert acts == [True, True, True, False, True, False, False, False, False, False]
    for t in (0.0, 1.0):  # nothing moves where one of them is 0
        assert torch.equal(
            strong(asked.x0, t, asked.context()).native, asked.denoiser(asked.x0, t, asked.context()).native
        )


def test_noise_is_regional() -> None:
    asked = task()
    mask = fitted(asked.mask, asked.x0)
    inner, x, ctx = solvers.get("ddim"), asked.x0, asked.context()
    one = RegionalNoise(inner, mask, eta=0.6, begin=0.0, end=1.0)
    ctx.run.total = 5
    st = inner.init(x, 0.8, asked.denoiser, ctx)
    got, plain = one.step(st, 0.6, asked.denoiser, ctx).x, inner.step(st, 0.6, asked.denoiser, asked.context()).x
    outside = mask.expand_as(x) == 0
    assert torch.equal(got[outside], plain[outside])
    same = asked.context()
    whole = solvers.get("ddpm", eta=0.6).step(st, 0.6, asked.denoiser, same).x
    assert torch.equal(got[~outside], whole[~outside])
    assert ctx.run.nfe == 1  # both steps come from one call


@pytest.mark.parametrize("repeats", [0, 2])
def test_time_travel_on_an_exact_flow_changes_little(repeats: int) -> None:
    """Down and up again along the same probability flow comes back to second order in the step."""
    oracle = sf.oracles.GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.3, 0.3]), torch.ones(2) / 2)
    denoiser, solver = oracle.denoiser(sf.processes.VP()), solvers.get("ddim")
    x = torch.linspace(-2, 2, 9)[:, None].double()
    travel = TimeTravel(solver, denoiser, repeats, 0.0, 1.0)
    gaps = []
    for steps in (40, 80):
        ends = [
            list(trajectory(denoiser, s, grids.get("uniform"), steps, x=x, stop=0.2))[-1].x for s in (solver, travel)
        ]
        gaps.append((ends[0] - ends[1]).abs().max().item())
    assert gaps == [0, 0] if repeats == 0 else 0 < gaps[1] < 0.7 * gaps[0]


def test_trivial_numbers_are_inversion_and_back() -> None:
    """Without copy, energies, noise and travel nothing is left but the solver there and back."""
    asked = task()
    bare = replace(COPY, copy=False)(asked)
    up = asked.run(asked.x0, denoiser=asked.denoiser, cond=asked.source, start=0.0, stop=1.0)
    torch.testing.assert_close(bare, asked.run(up.x).x, rtol=1e-10, atol=1e-10)


def test_a_move_by_nothing_is_a_reconstruction() -> None:
    """Energies, bank and copy say that everything stays where it is: the features are those of the inversion."""
    asked = task(points=((2.0, 2.0, 2.0, 2.0),), guidance=lambda d: d, scale=1.0, steps=8)
    plain = replace(COPY, copy=False)(asked)
    got = DiffEditor(noise=0.0, repeats=0)(asked)
    assert (got - asked.x0).square().mean() <= 1.2 * (plain - asked.x0).square().mean()


def test_the_memory_is_that_of_the_same_time() -> None:
    asked = task()
    paths = decoder_paths(asked.denoiser.net)
    memory = Memory.of(asked, asked.x0, asked.source, paths, True)
    assert sorted(memory.states) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and torch.equal(
        memory.states[0.0], asked.x0
    )
    for t, x in memory.states.items():
        torch.testing.assert_close(memory.features[t], features(asked.denoiser, x, t, asked.context(), paths)[1])
    assert asked.nfe[0] == 5 + 6  # the inversion, and one look at each state


def test_the_object_is_where_it_was_told_to_be() -> None:
    """Features at the target are more like the object's with the energies than without."""
    asked = task(steps=10, guidance=lambda d: d, scale=1.0)
    paths = decoder_paths(asked.denoiser.net)
    memory = Memory.of(asked, asked.x0, asked.source, paths, False)
    move = Move(torch.tensor([3 / 8, 0.0]), centre_of(asked.mask))
    there = move(asked.mask)
    score = {}
    for name, method in {
        "with": DiffEditor(scale=50.0, noise=0.0, repeats=0, copy=False),
        "without": replace(COPY, copy=False),
    }.items():
        x = method(asked)
        found = features(asked.denoiser, x, 0.2, asked.context(), paths)[1]
        known = (
            memory.features[0.2]
            if 0.2 in memory.features
            else memory.features[min(memory.features, key=lambda t: abs(t - 0.2))]
        )
        score[name] = sum(mean_in(alike(h, move(known[p])), fitted(there, h)).mean().item() for p, h in found.items())
    assert score["with"] > score["without"]


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("process", [sf.processes.Flow(), sf.processes.VP()], ids=["flow", "vp"])
@pytest.mark.parametrize("kind", ["move", "drag", "appearance", "paste"])
def test_every_task_on_every_network(name: str, process: Any, kind: str) -> None:
    net = unet() if name == "unet" else dit()
    other = torch.randn(N, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(9)).double() * 0.5
    asked = task(net, process, steps=3, reference=other if kind in ("appearance", "paste") else None)
    out = DiffEditor(task=kind)(asked)
    assert out.isfinite().all() and out.dtype == asked.x0.dtype
    alone = {k: v[:1] for k, v in asked.source.items()}
    one = replace(
        asked, x0=asked.x0[:1], images=asked.images[:1], mask=asked.mask[:1], source=alone, target=alone, nfe=[0.0],
        reference=None if asked.reference is None else asked.reference[:1],
    )  # fmt: skip
    torch.testing.assert_close(DiffEditor(task=kind)(one), out[:1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["dpm-solver++", "heun"])
def test_other_solvers_follow(solver: str) -> None:
    asked = task(solver=solvers.get(solver))
    assert DiffEditor()(asked).isfinite().all()


def test_decoders_are_found() -> None:
    assert decoder_paths(unet()) == ("level.up", "level.deep.up")
    assert decoder_paths(dit()) == ("blocks.2", "blocks.3")
    with pytest.raises(InputError, match="paths="):
        decoder_paths(torch.nn.Linear(2, 2))


def test_a_tiny_diffusers_pipeline_is_edited() -> None:
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    made = sf.from_diffusers(tiny.pipeline("sd"))
    height, width = made.size
    image = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = torch.zeros(height, width)
    mask[: height // 2, : width // 2] = 1
    out = editing.perform(
        made, image, "a dog", method="diffeditor", mask=mask, points=[(1, 1, 1 + width // 2, 1)], steps=4, guidance=2.0
    )
    assert out.state.isfinite().all() and out.images.shape == image.shape


@pytest.mark.parametrize(
    ("numbers", "given", "what"),
    [
        ({}, {"mask"}, "points"),
        ({"task": "drag"}, set(), "points"),
        ({"task": "paste"}, {"mask"}, "reference"),
        ({}, {"points", "mask", "reference"}, "reference"),
    ],
    ids=["move", "drag", "paste", "unused"],
)
def test_what_a_task_needs(numbers: dict[str, Any], given: set[str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        DiffEditor(**numbers).check("diffeditor", frozenset(given))
    DiffEditor(resize=2.0).check("diffeditor", frozenset({"mask"}))


@pytest.mark.parametrize(
    "numbers", [{"task": "fly"}, {"resize": 0.0}, {"task": "drag", "resize": 2.0}, {"radius": 2.0}]
)
def test_wrong_numbers_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        DiffEditor(**numbers)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(InputError, match="out of it"):
        COPY(task(points=((0.0, 0.0, 7.0, 7.0),), mask=torch.nn.functional.pad(torch.ones(N, 1, 2, 2), (6, 0, 6, 0))))
    with pytest.raises(InputError, match="one point"):
        COPY(task(points=((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 2.0, 2.0))))
    with pytest.raises(InputError, match="times of the grid"):
        DiffEditor(bank=False)(task(solver=solvers.get("dpm-solver-2")))
    asked = task()
    with pytest.raises(InputError, match="one number an item"):
        term = Term(lambda found, t: found["level.up"], torch.ones(N, 1, 1, 1))
        energies([term], ["level.up"], estimator=asked.denoiser)(asked.denoiser)(asked.x0, 0.5, asked.context())
    with pytest.raises(InputError, match="nothing"):
        energies([], ["level.up"], estimator=asked.denoiser)(asked.denoiser)
    with pytest.raises(InputError, match="eta"):
        RegionalNoise(solvers.get("ddim"), asked.mask, eta=2.0)
    with pytest.raises(InputError, match="repeats"):
        TimeTravel(solvers.get("ddim"), asked.denoiser, repeats=-1)
    assert Context.of(1).run.total is None
