"""``sf.distill`` end to end at toy size: every method gives an ordinary pipeline, and a stopped one goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfumato import codecs, conditioners, networks
from sfumato.core import InputError
from sfumato.denoisers import parametrized
from sfumato.distillation import METHODS, distill
from sfumato.pipeline import Pipeline, load
from sfumato.processes import Flow

QUICK: dict[str, Any] = {"iterations": 4, "batch": 4, "trajectories": 6, "calls": 4, "cpu": True, "progress": False}


def teacher() -> Pipeline:
    """A class-conditional flow of 4 x 4 pixels with random weights."""
    torch.manual_seed(0)
    net = networks.DiT(1, size=4, patch=2, width=16, depth=1, heads=2, embeddings={"kind": 3})
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    denoiser = parametrized(net.eval(), Flow(), "flow", null={"kind": 3})
    return Pipeline(denoiser, codecs.Identity(1), conditioners.Classes({"kind": ["a", "b", "c"]}), (4, 4), guidance=2.0)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_gives_a_pipeline_that_saves_and_samples(method: str, tmp_path: Path) -> None:
    made = distill(teacher(), method, 2, out=tmp_path / "run", model="toy", scores=method == "segments", **QUICK)
    again = load(tmp_path / "run")
    assert made.guidance == 1.0 and made.steps == 2
    first = made.generate(["a", "c"], seed=3)
    assert first.shape == (2, 1, 4, 4)
    assert (first.int() - again.generate(["a", "c"], seed=3).int()).abs().max() <= 2  # half precision
    assert again.card["method"] == method and again.card["teacher"]["guidance"] == 2.0
    assert again.card["cost"]["iterations"] >= 4
    before = dict(teacher().denoiser.named_parameters())
    assert any(not torch.equal(p, before[k]) for k, p in made.denoiser.named_parameters())


def test_a_stopped_distillation_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {**QUICK, "iterations": 6}
    whole = distill(teacher(), "segments", 2, out=tmp_path / "whole", save_every=2, **options)

    class Stop(Exception):
        pass

    from sfumato.training import trainer as module

    saved, keep = [], module.Trainer.save

    def save(self: Any) -> None:
        keep(self)
        saved.append(self.it)
        if saved == [2, 4]:
            raise Stop

    module.Trainer.save = save  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            distill(teacher(), "segments", 2, out=tmp_path / "parts", save_every=2, **options)
    finally:
        module.Trainer.save = keep  # type: ignore[method-assign]
    parts = distill(teacher(), "segments", 2, out=tmp_path / "parts", save_every=2, **options)
    for (name, a), (_, b) in zip(whole.denoiser.named_parameters(), parts.denoiser.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_teacher_is_not_touched_and_adapters_are_kept(tmp_path: Path) -> None:
    from sfumato.denoisers import lora

    pipeline = teacher()
    before = {k: v.clone() for k, v in pipeline.denoiser.state_dict().items()}
    made = distill(pipeline, "lcm-lora", 2, out=tmp_path, rank=2, **QUICK)
    assert all(torch.equal(v, pipeline.denoiser.state_dict()[k]) for k, v in before.items())
    adapter = lora.load(tmp_path / "adapter.safetensors", pipeline.denoiser)
    plugged = lora.merge(pipeline.denoiser, adapter)
    x, label = torch.randn(2, 1, 4, 4), torch.tensor([0.4, 0.9])
    torch.testing.assert_close(plugged.net(x, label), made.denoiser.net(x, label), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_said() -> None:
    for wrong, text in (
        ({"method": "magic"}, "one of segments"),
        ({"calls": 5, "steps": 2}, "multiple"),
        ({"iterations": 0}, "at least 1"),
    ):
        with pytest.raises(InputError, match=text):
            distill(teacher(), **{"cpu": True, **wrong})


@pytest.mark.parametrize("method", ["segments", "lcm-lora"])
def test_text_pipelines_of_diffusers_learn_the_prompts_they_are_given(method: str) -> None:
    pytest.importorskip("diffusers")
    import sfumato as sf
    from sfumato.interop import tiny

    pipeline = sf.from_diffusers(tiny.pipeline("sd"))
    with pytest.raises(InputError, match="give the prompts"):
        distill(pipeline, method, 2, **QUICK)
    made = distill(pipeline, method, 2, prompts=["a cat", "a red boat"], guidance=3.0, **{**QUICK, "iterations": 2})
    assert made.guidance == 1.0 and made.source.unet is made.denoiser.net.model  # type: ignore[attr-defined]
    ours, before = (dict(p.source.unet.named_parameters()) for p in (made, pipeline))  # type: ignore[attr-defined]
    assert set(ours) == set(before) and any(not torch.equal(ours[k], before[k]) for k in ours)
    assert made.generate(["a cat"], seed=1).shape == pipeline.generate(["a cat"], steps=2, seed=1).shape
