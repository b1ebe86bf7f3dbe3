"""Null-text optimisation: the picture comes back under guidance, never farther off than without the fit, item by item."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_inversion import Wide, images
from tiny_inversion import tiny as classes
from tiny_text import text_unet

import sfumato as sf
from sfumato import conditioners, editing, pipeline
from sfumato.core import InputError
from sfumato.denoisers import parametrized
from sfumato.editing.base import Task
from sfumato.editing.methods.direct_inversion import trail
from sfumato.editing.methods.null_text import Nulls, NullText

FREE: dict[str, Any] = {"cross": 0.0, "structure": 0.0}
LAWS = {"cosine": sf.processes.Cosine(), "flow": sf.processes.Flow()}


class Words(conditioners.Conditioner):
    """Three words a prompt, drawn from its letters."""

    name, config = "words", {}

    def __call__(self, n, prompts=None, **raw):
        rows = [torch.zeros(3, 8) if not p else _drawn(p) for p in prompts or [""] * n]
        return {"text": torch.stack(rows).double()}


def _drawn(prompt):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(sum(map(ord, prompt))))


class TwoChannels(Wide):
    """The network reads two of the three colours."""

    def encode(self, data, ctx=None):
        return super().encode(data, ctx)[:, :2]

    def decode(self, x, ctx=None):
        return torch.cat([x, x[:, :1]], 1)


def worded(law="cosine", std=0.1):
    denoiser = parametrized(text_unet(std), LAWS[law], "v", null={"text": 0.0})
    return pipeline.Pipeline(denoiser, TwoChannels(torch.float64), Words(), (8, 8), guidance=3.0)


class Kept(NullText):
    """Keeps the task, so that a test can look inside."""

    def __call__(self, task: Task) -> Any:
        type(self).task = task
        return super().__call__(task)


def task_of(pipe, **options):
    method = Kept(iterations=0, **FREE)
    sf.edit(pipe, images(), "a cat", source="a dog", method=method, **{"steps": 8, "guidance": 4.0, **options})
    return Kept.task


def back(pipe, method, **options):
    """How far the image comes back from itself, when the target is the source: (2,)."""
    options = {"steps": 8, "guidance": 4.0, **options}
    found = editing.perform(pipe, images(), "a dog", method=method, source="a dog", **options)
    return (found.state - pipe.codec.encode(images())).flatten(1).norm(dim=1), found


@pytest.mark.parametrize("law,solver", [("cosine", "ddim"), ("flow", "ddim"), ("cosine", "dpm-solver++")])
def test_under_guidance_the_picture_comes_back_nearer_than_by_plain_inversion(law, solver):
    pipe, options = worded(law), {"solver": solver, "steps": 6}
    plain, _ = back(pipe, "ddim-inversion", **options)
    fitted, _ = back(pipe, NullText(iterations=10, rate=0.1, **FREE), **options)
    assert (fitted < 0.9 * plain).all()


def test_no_step_ends_farther_off_than_with_the_null_it_began_with():
    task = task_of(worded(), steps=4)
    stored = trail(task, 1.0)
    for rate in (0.05, 50.0):  # a rate that overshoots keeps the best it saw
        method = NullText(iterations=3, rate=rate, **FREE)
        nulls, times = method.fitted(task, stored), sorted(stored, reverse=True)
        st, before = stored[1.0], method._begun(task)
        for t, s in zip(times, times[1:], strict=False):
            errors = []
            for null in (before, nulls[t]):
                there = method._step(task, st, null)
                errors.append((there.x - stored[s]).flatten(1).norm(dim=1))
            assert (errors[1] <= errors[0] * (1 + 1e-12)).all()
            st, before = there, nulls[t]


def test_the_nulls_are_found_item_by_item():
    pipe = worded()
    given = {"method": NullText(iterations=5, rate=0.1, **FREE), "steps": 6, "guidance": 4.0}
    both = editing.perform(pipe, images(), ["a cat", "a cow"], source=["a dog", "a sow"], **given)
    for i, (target, source) in enumerate([("a cat", "a dog"), ("a cow", "a sow")]):
        one = editing.perform(pipe, images()[i : i + 1], target, source=source, **given)
        assert torch.allclose(both.state[i : i + 1], one.state, atol=1e-8) and both.nfe == one.nfe
    assert both.nfe == 6 + 6 * 2 * (5 + 1 + 1) + 6 * 2


def test_what_is_left_of_it_at_the_ends():
    """No guidance: DDIM inversion. The source as the null: no guidance under the source, an edit under the target."""
    pipe = worded()
    options = {"source": "a dog", "steps": 8}
    ours = editing.perform(pipe, images(), "a cat", method=NullText(**FREE), guidance=1.0, **options)
    ddim = editing.perform(pipe, images(), "a cat", method="ddim-inversion", guidance=1.0, **options)
    assert torch.equal(ours.state, ddim.state)
    npi = editing.get("negative-prompt-inversion")
    free, _ = back(pipe, "ddim-inversion", guidance=1.0)
    assert torch.allclose(back(pipe, npi)[0], free, atol=1e-9) and (free < back(pipe, "ddim-inversion")[0]).all()
    edited = editing.perform(pipe, images(), "a cat", method=npi, guidance=4.0, **options)
    assert (edited.state - back(pipe, npi)[1].state).abs().max() > 1e-2


def test_both_branches_of_attention_control_share_the_nulls():
    pipe = worded()
    method = NullText(iterations=3, rate=0.1, cross=0.0, structure=1.0)
    task = task_of(pipe)
    nulls = method.fitted(task, trail(task, 1.0))
    guided = Nulls(task.guided, nulls)
    t = max(nulls)
    x = torch.cat([task.x0, task.x0.flip(0)])
    ctx = sf.Context.of(4, None, cond={k: torch.cat([v, v]) for k, v in task.source.items()}, dtype=x.dtype)
    one = sf.Context.of(2, None, cond=dict(task.source), dtype=x.dtype)
    ctx.run.t = one.run.t = t
    assert torch.allclose(guided(x, t, ctx).mean[:2], guided(task.x0, t, one).mean)
    found = editing.perform(pipe, images(), "a dog", source="a dog", method=method, steps=8, guidance=4.0)
    assert torch.allclose(found.state, back(pipe, NullText(iterations=3, rate=0.1, **FREE))[1].state, atol=1e-8)


def test_classes_have_no_numbers_to_fit_but_can_be_the_null():
    pipe = classes(LAWS["cosine"])
    with pytest.raises(InputError, match="no numbers"):
        sf.edit(pipe, images(), "twemoji", source="noto", method="null-text", steps=4, guidance=3.0)
    found = editing.perform(
        pipe, images(), "noto", source="noto", method="negative-prompt-inversion", steps=8, guidance=5.0
    )
    plain = editing.perform(pipe, images(), "noto", source="noto", method="ddim-inversion", steps=8, guidance=1.0)
    assert torch.allclose(found.state, plain.state, atol=1e-9)


def test_refusals():
    pipe = worded()
    options = {"source": "a dog", "method": "null-text(cross=0, structure=0)", "steps": 4}
    for wrong, said in [({"solver": "ddpm"}, "draws noise"), ({"guidance": "threshold"}, "no null")]:
        with pytest.raises(InputError, match=said):
            sf.edit(pipe, images(), "a cat", **{"guidance": 3.0, **wrong}, **options)
    for numbers in ({"iterations": -1}, {"rate": 0.0}, {"begin": "there"}, {"strength": 0.0}):
        with pytest.raises(InputError):
            NullText(**numbers)
