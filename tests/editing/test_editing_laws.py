"""Laws of every registered editing method: it asks for what it needs, edits item by item, and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from tiny_editing import tiny

import sfumato as sf
from sfumato import editing, processes
from sfumato.core import InputError


@pytest.fixture(scope="module", params=[processes.Cosine(), processes.Flow()], ids=["cosine", "flow"])
def pipe(request):
    return tiny(request.param)


def inputs(name: str, n: int) -> dict:
    """Everything the method can use, for n items that differ."""
    method = editing.get(name)
    mask = torch.zeros(n, 1, 8, 8)
    mask[:, :, :4] = 1
    every = {
        "mask": mask, "points": [(2, 2, 4, 4)],
        "reference": torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(2)).to(torch.uint8),
        "source": ["noto"] * n,
    }  # fmt: skip
    return {k: v for k, v in every.items() if k in method.needs | method.accepts}


def said(name: str, n: int) -> list[str] | None:
    """The prompts, where the method reads any."""
    method = editing.get(name)
    return ["twemoji"] * n if "prompt" in method.needs | method.accepts else None


def run(pipe, name, images, options, **more):
    try:
        return editing.perform(pipe, images, said(name, len(images)), method=name, steps=6, **options, **more)
    except InputError as refusal:
        pytest.skip(f"refused: {refusal}")


@pytest.mark.parametrize("name", editing.names())
def test_an_edit_is_made_item_by_item(pipe, name):
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    options = inputs(name, 2)
    both = run(pipe, name, images, options, seed=3)
    alone = {k: v[:1] if k != "points" else v for k, v in options.items()}
    one = run(pipe, name, images[:1], alone, seed=3)
    assert both.images.dtype == torch.uint8 and both.images.shape[:2] == (2, 3)
    assert torch.isfinite(both.state).all() and both.nfe > 0
    torch.testing.assert_close(both.state[:1], one.state, atol=2e-4, rtol=1e-3)
    assert both.nfe == pytest.approx(one.nfe)


@pytest.mark.parametrize("name", editing.names())
def test_an_edit_repeats_and_leaves_the_model_as_it_was(pipe, name):
    images = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    weights = {k: v.clone() for k, v in pipe.denoiser.state_dict().items()}
    before = pipe.generate(["noto"], steps=2)
    first = run(pipe, name, images, inputs(name, 1), seed=1)
    torch.manual_seed(99)  # nothing global is drawn from
    assert torch.equal(first.state, run(pipe, name, images, inputs(name, 1), seed=1).state)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.denoiser.state_dict().items())
    assert all(p.grad is None for p in pipe.denoiser.parameters())
    assert torch.equal(before, pipe.generate(["noto"], steps=2))


@pytest.mark.parametrize("name", editing.names())
def test_what_is_needed_is_asked_for_and_what_is_useless_is_refused(pipe, name):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    method, options = editing.get(name), inputs(name, 1)
    for key in method.needs - {"prompt"}:
        less = {k: v for k, v in options.items() if k != key}
        with pytest.raises(InputError, match=f"{name} needs"):
            sf.edit(pipe, image, said(name, 1), method=name, **less)
    if "prompt" in method.needs:
        with pytest.raises(InputError, match=f"{name} needs"):
            sf.edit(pipe, image, method=name, **options)
    for key, value in {"mask": torch.ones(8, 8), "points": [(1, 1, 2, 2)], "reference": image}.items():
        if key not in method.needs | method.accepts:
            with pytest.raises(InputError, match=f"does not use {key}="):
                sf.edit(pipe, image, said(name, 1), method=name, **options, **{key: value})
