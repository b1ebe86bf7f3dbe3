"""Cyclic one-way diffusion: what is known stays, levels match, and information goes one way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sfumato as sf
from sfumato import codecs, conditioners, editing, oracles, pipeline
from sfumato.core import Context, Denoiser, InputError, Posterior
from sfumato.editing.methods.cow import CyclicOneWay
from sfumato.processes import VP, Cosine, Flow

SIDE = 4


class Field(Denoiser):
    """The exact belief of a smooth random picture: a Gaussian over pixels whose covariance falls with their distance."""

    def __init__(self, process: Any, reach: float = 1.5) -> None:
        super().__init__()
        at = torch.cartesian_prod(*[torch.arange(SIDE, dtype=torch.float64)] * 2)
        near = 0.25 * (-torch.cdist(at, at) / reach).exp()
        self.inside = oracles.Gaussian(torch.zeros(SIDE * SIDE), near).denoiser(process)
        self.process, self.null = process, {"y": 1}

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        post = self.inside(x.transpose(0, 1).flatten(2).flatten(0, 1), t, ctx)
        ctx.run.nfe += len(x) / ctx.batch - 3 * len(x) / ctx.batch
        native = post.native.unflatten(0, (3, len(x))).unflatten(2, (SIDE, SIDE)).transpose(0, 1)
        return Posterior(native, post.kind, x, post.coef)


class Wide(codecs.Identity):
    def encode(self, data: Tensor, ctx: Any = None) -> Tensor:
        return codecs.to_float(data, torch.float64)


def pipe(process: Any = None) -> Any:
    classes = conditioners.Classes({"y": ["thing"]})
    return pipeline.Pipeline(Field(process or VP()), Wide(), classes, (SIDE, SIDE), grid="uniform", guidance=1.0)  # type: ignore[arg-type]


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(60, 200, (n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def right() -> Tensor:
    mask = torch.zeros(SIDE, SIDE)
    mask[:, SIDE // 2 :] = 1
    return mask


def edit(model: Any, pictures: Tensor, **options: Any) -> Tensor:
    options = {"steps": 20, "mask": right(), **options}
    return editing.perform(model, pictures, "thing", method="cow", **options).state


LAWS = pytest.mark.parametrize("process", [VP(), Flow(), Cosine()], ids=["vp", "flow", "cosine"])


@LAWS
@pytest.mark.parametrize("known", ["inverted", "noised"])
def test_the_known_part_returns_exactly_at_last_0(process: Any, known: str) -> None:
    model, given = pipe(process), images()
    x = edit(model, given, last=0.0, cycles=2, known=known)
    truth = codecs.to_float(given, torch.float64)
    torch.testing.assert_close(x[..., :2], truth[..., :2], rtol=0, atol=0)
    assert (x[..., 2:] - truth[..., 2:]).abs().mean() > 0.05


@LAWS
def test_an_inverted_part_returns_nearly_without_the_last_overwriting(process: Any) -> None:
    given = images()
    truth = codecs.to_float(given, torch.float64)[..., :2]
    errors = [float((edit(pipe(process), given, steps=n, cycles=2)[..., :2] - truth).abs().mean()) for n in (20, 80)]
    assert errors[1] < errors[0] < 0.25


def test_the_states_that_overwrite_have_the_noise_of_their_time() -> None:
    """Every time of the cycles' runs is recorded, so that no state of another level is pasted."""
    from sfumato.editing.methods.cow import Overwritten

    seen: list[bool] = []

    class Spy(Overwritten):
        def step(self, st: Any, s: Any, denoiser: Any, ctx: Any) -> Any:
            seen.append(len(self.recorded) == 1 or s in self.recorded)
            return super().step(st, s, denoiser, ctx)

    import sfumato.editing.methods.cow as module

    original, module.Overwritten = module.Overwritten, Spy  # type: ignore[misc]
    try:
        for grid in ("uniform", "arctan", "karras"):
            for known in ("inverted", "noised"):
                edit(pipe(), images(), grid=grid, known=known, cycles=2, steps=30)
    finally:
        module.Overwritten = original  # type: ignore[misc]
    assert len(seen) > 50 and all(seen)


def test_information_goes_one_way() -> None:
    """Another known part changes the rest; another beginning of the rest changes the known part much less."""
    model, given, other = pipe(), images(4), images(4, 9)
    known, rest = given.clone(), given.clone()
    known[..., :2], rest[..., 2:] = other[..., :2], other[..., 2:]
    base, one, two = (edit(model, picture, cycles=6, canvas=None) for picture in (given, known, rest))
    outside, inside = (one - base)[..., 2:].abs().mean(), (two - base)[..., :2].abs().mean()
    assert outside > 3 * inside


def test_cycles_bring_the_rest_to_its_conditional_law() -> None:
    """For a Gaussian picture the mean of the rest given the known part is known: more cycles come nearer to it."""
    model, n = pipe(), 64
    given = images(1, 3).expand(n, -1, -1, -1)
    at = torch.arange(16).view(4, 4)
    known, rest = at[:, :2].flatten(), at[:, 2:].flatten()
    law = model.denoiser.inside.distribution
    cov = (law.basis * law.variances) @ law.basis.T
    gain = cov[rest][:, known] @ torch.linalg.inv(cov[known][:, known])
    x0 = codecs.to_float(given[:1], torch.float64)[0].flatten(1)
    expected = (x0[:, known] @ gain.T).view(3, 4, 2)
    errors = []
    for cycles in (0, 8):
        x = edit(model, given, cycles=cycles, last=0.0, steps=30, canvas=0.9)
        errors.append(float((x[..., 2:].mean(0) - expected).square().mean().sqrt()))
    assert errors[1] < 0.6 * errors[0]


def test_items_seeds_and_calls() -> None:
    model, given = pipe(), images(3)
    x = edit(model, given)
    torch.testing.assert_close(edit(model, given), x, rtol=0, atol=0)
    torch.testing.assert_close(edit(model, given[:2]), x[:2])
    assert not torch.equal(edit(model, given, seed=1), x)
    found = editing.perform(model, given, "thing", method="cow(cycles=3)", steps=20, mask=right())
    assert found.nfe == 14 + 10 + 3 * 4 + 10


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"low": 0.3}, "last < low"), ({"high": 0.4}, "low < high"), ({"cycles": -1}, "0 or more"), ({"known": "true"}, "inverted, noised"),
        ({"canvas": 2.0}, "grey"),
    ],
)  # fmt: skip
def test_bad_numbers_are_said(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CyclicOneWay(**numbers)


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="all or nothing"):
        edit(pipe(), images(), mask=torch.ones(SIDE, SIDE))


def test_a_stable_diffusion_pipeline_cycles() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from sfumato.interop.tiny import pipeline as tiny

    model = sf.from_diffusers(tiny("sd"))
    picture = torch.randint(0, 256, (1, 3, *model.size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mask = torch.zeros(model.size)
    mask[:, model.size[1] // 2 :] = 1
    found = editing.perform(
        model, picture, "a cat", method="cow(cycles=2, last=0.0)", mask=mask, steps=10, guidance=2.0
    )
    half = found.state.shape[-1] // 2
    torch.testing.assert_close(found.state[..., :half], model.codec.encode(picture)[..., :half])
