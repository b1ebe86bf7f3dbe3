"""``sf.distill`` end to end at toy size: every method gives an ordinary pipeline, and a stopped one goes on bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import codecs, conditioners, networks
from sfumato.core import Context, InputError
from sfumato.core.errors import UnknownName
from sfumato.denoisers import parametrized
from sfumato.distillation import METHODS, distill
from sfumato.distillation.activations import Shown, seen
from sfumato.distillation.job import answering
from sfumato.distillation.smaller import slimmed
from sfumato.pipeline import Pipeline, load
from sfumato.processes import EDM, VP, Flow, ResidualShift

QUICK: dict[str, Any] = {"iterations": 4, "batch": 4, "trajectories": 6, "calls": 4, "cpu": True, "progress": False}


def teacher() -> Pipeline:
    """A class-conditional flow of 4 x 4 pixels with random weights."""
    torch.manual_seed(0)
    net = networks.DiT(1, size=4, patch=2, width=16, depth=1, heads=2, embeddings={"kind": 3})
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    denoiser = parametrized(net.eval(), Flow(), "flow", null={"kind": 3})
    return Pipeline(denoiser, codecs.Identity(1), conditioners.Classes({"kind": ["a", "b", "c"]}), (4, 4), guidance=2.0)


def restorer() -> Pipeline:
    """A residual-shift model that enlarges 4 x 4 to 8 x 8 pixels, with random weights."""
    torch.manual_seed(0)
    net = networks.UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=False, extra_channels=1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    told = conditioners.Degraded((8, 8), operator="downsample(factor=2, noise=0.05)")
    denoiser = parametrized(net.eval(), ResidualShift(), "x0")
    return Pipeline(denoiser, codecs.Identity(1), told, (8, 8), solver="ddim", grid="uniform", steps=15)


def pictures(n: int = 9, side: int = 4) -> Tensor:
    """n pictures of noise, uint8."""
    return torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def given(method: str) -> dict[str, Any]:
    """The data of a method that learns from pictures."""
    if METHODS[method].reads == "restored":
        return {"data": pictures(side=8)}
    return {"data": {"x": pictures(), "prompt": list("abcabcabc")}} if METHODS[method].reads == "data" else {}


def asked(method: str) -> tuple[Pipeline, Any, dict[str, Any]]:
    """(teacher, prompts, raw conditions) with which a student of the method is tried."""
    if METHODS[method].reads == "restored":
        return restorer(), 2, {"image": pictures(2)}
    return teacher(), ["a", "c"], {}


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_gives_a_pipeline_that_saves_and_samples(method: str, tmp_path: Path) -> None:
    pipeline, prompts, cond = asked(method)
    steps = 1 if METHODS[method].once else 2
    made = distill(
        pipeline, method, steps, out=tmp_path / "run", model="toy", scores=True, **given(method), **QUICK
    )  # fmt: skip
    again = load(tmp_path / "run")
    assert made.guidance == 1.0 and made.steps == steps
    first = made.generate(prompts, seed=3, cond=cond)
    assert first.shape == (2, 1, *pipeline.size)
    assert (first.int() - again.generate(prompts, seed=3, cond=cond).int()).abs().max() <= 2  # half precision
    assert again.card["method"] == method and again.card["teacher"]["model"] == "toy"
    assert again.card["teacher"]["guidance"] == (pipeline.guidance if METHODS[method].guided else 1.0)
    assert again.card["cost"]["iterations"] >= 4
    before = dict(pipeline.denoiser.named_parameters())
    assert any(k not in before or not torch.equal(p, before[k]) for k, p in made.denoiser.named_parameters())


class Stop(Exception):
    """In the place of a killed process."""


@contextmanager
def killed_after(saves: int) -> Iterator[None]:
    """A training is cut off right after it has written so many checkpoints."""
    from sfumato.training import trainer as module

    count, keep = [0], module.Trainer.save

    def save(self: Any) -> None:
        keep(self)
        count[0] += 1
        if count[0] == saves:
            raise Stop

    module.Trainer.save = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.Trainer.save = keep  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "method,saves", [("boot", 2), ("mmd-ddm", 2), ("ddgan", 2), ("tad-sr", 2), ("slimflow", 2), ("slimflow", 5)]
)
def test_new_players_and_data_go_on_bit_for_bit(method: str, saves: int, tmp_path: Path) -> None:
    """slimflow: within its first part, and within its second."""
    options = {**QUICK, "iterations": 6, "save_every": 2, **given(method)}
    whole = distill(asked(method)[0], method, 1, out=tmp_path / "whole", **options)
    with killed_after(saves), pytest.raises(Stop):
        distill(asked(method)[0], method, 1, out=tmp_path / "parts", **options)
    parts = distill(asked(method)[0], method, 1, out=tmp_path / "parts", **options)
    for (name, a), (_, b) in zip(whole.denoiser.named_parameters(), parts.denoiser.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_small_network_is_like_the_large_one() -> None:
    for net in (
        networks.UNet(
            3, width=32, multipliers=(1, 2), attention=(False, True), embeddings={"y": 10}, embedding_width=64
        ),
        networks.DiT(4, width=192, heads=3, depth=2, context_channels=8, vector_channels=8),
        networks.MLP(5, width=64),
    ):
        small = slimmed(net, 0.5)
        sizes = [sum(p.numel() for p in n.parameters()) for n in (net, small)]
        assert small.accepts == net.accepts and type(small) is type(net)
        assert 0.15 * sizes[0] < sizes[1] < 0.6 * sizes[0]
        assert small.config["width"] * 2 == net.config["width"]
        assert all(torch.equal(p, q) for p, q in zip(small.parameters(), slimmed(net, 0.5).parameters(), strict=True))
    with pytest.raises(InputError, match="no smaller Linear"):
        slimmed(nn.Linear(2, 2), 0.5)


def test_a_student_in_one_call_is_read_where_its_answer_counts() -> None:
    """eps says next to nothing of x0 at t = 1 under VP; v, x0 and flow do, and stay what they were."""
    net = networks.MLP(2)
    assert answering(parametrized(net, VP(), "eps")).predicts == "v"
    assert answering(parametrized(net, EDM(), "eps")).predicts == "eps"
    for kind in ("x0", "v"):
        assert answering(parametrized(net, VP(), kind)).predicts == kind


def test_features_of_the_teacher_are_of_mean_0_and_differentiable_and_of_the_state_alone() -> None:
    pipeline, x = teacher(), torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    eyes = seen(pipeline, "teacher", x, {})
    found = eyes(x)
    assert found.mean(0).abs().max() < 1e-4 and (found.std(0) - 1).abs().max() < 1e-2
    torch.testing.assert_close(eyes(x[3:5]), found[3:5], rtol=1e-4, atol=1e-4)
    y = x[:3].clone().requires_grad_()
    (slope,) = torch.autograd.grad(eyes(y)[0].square().sum(), y)
    assert slope[0].norm() > 1e-3 and slope[1:].norm() == 0
    assert torch.allclose(
        seen(pipeline, "pixels", x, {})(x), (x.flatten(1) - x.flatten(1).mean(0)) / x.flatten(1).std(0), atol=1e-5
    )
    with pytest.raises(UnknownName, match="no feature extractor"):
        seen(pipeline, "eyes", x, {})


def test_features_of_what_is_shown_are_compared_as_a_mean_of_cut_and_uncut() -> None:
    """<u, v> / 2d = (<cut u, cut v> + w^2 <u, v>) / ((1 + w^2) d): within [-1, 1] the body's own, beyond it a share of the slope."""
    generator = torch.Generator().manual_seed(0)
    body = nn.Linear(6, 5)
    for scale in (0.2, 3.0):
        u, v = (scale * torch.rand(2, 7, 6, generator=generator).mul(2).sub(1)).requires_grad_()
        cut, uncut = (body(a.clamp(-1, 1)) @ body(b.clamp(-1, 1)).T / 5 if c else body(a) @ body(b).T / 5
                      for a, b, c in ((u, v, True), (u, v, False)))  # fmt: skip
        eyes = Shown(body, 0.5)
        torch.testing.assert_close(eyes(u) @ eyes(v).T / 10, (cut + 0.25 * uncut) / 1.25)
        if scale < 1:
            torch.testing.assert_close(eyes(u) @ eyes(v).T / 10, body(u) @ body(v).T / 5)
    x = torch.tensor([[-3.0, 0.4]], requires_grad=True)
    (slope,) = torch.autograd.grad(Shown(nn.Identity(), 0.5)(x).sum(), x)
    torch.testing.assert_close(slope[0, 0] / slope[0, 1], torch.tensor(1 / 3))
    for wrong in (-0.1, math.inf):
        with pytest.raises(InputError, match="share"):
            Shown(body, wrong)


def test_adapters_of_a_bundled_model_are_kept_alone(tmp_path: Path) -> None:
    made = distill(load("digits"), "lcm-lora", 2, out=tmp_path, model="digits", rank=2, **QUICK)
    assert made.card["cost"]["kept as"] == "an adapter of digits alone"
    file = tmp_path / "pipeline" / "model.safetensors"
    assert file.stat().st_size < 8 * made.card["cost"]["adapter parameters"]
    again = load(tmp_path)
    for (name, a), (_, b) in zip(made.denoiser.named_parameters(), again.denoiser.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(made.generate(["three"], seed=1), again.generate(["three"], seed=1))
    told = json.loads((tmp_path / "pipeline" / "pipeline.json").read_text())
    told["base"]["fingerprint"] = "of another one"
    (tmp_path / "pipeline" / "pipeline.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="adapter of digits"):
        load(tmp_path)


def test_a_stopped_distillation_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {**QUICK, "iterations": 6}
    whole = distill(teacher(), "segments", 2, out=tmp_path / "whole", save_every=2, **options)

    with killed_after(2), pytest.raises(Stop):
        distill(teacher(), "segments", 2, out=tmp_path / "parts", save_every=2, **options)
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
        ({"method": "boot"}, "one call"),
        ({"method": "tad-sr", "steps": 1, "data": pictures()}, "for restoration"),
        ({"method": "ddgan"}, "learns from pictures"),
        ({"method": "ddgan", "rank": 2}, "trains all weights"),
        ({"method": "segments", "data": pictures()}, "leave data= out"),
        ({"method": "mmd-ddm", "data": pictures()}, "need a field 'prompt'"),
        ({"method": "mmd-ddm", "data": {"x": pictures(side=8), "prompt": list("abcabcabc")}}, "resize them"),
        ({"method": "mmd-ddm", "data": {"x": pictures().float(), "prompt": list("abcabcabc")}}, r"floats in \[-1, 1\]"),
        (
            {"method": "mmd-ddm", "data": {"x": pictures() * math.nan, "prompt": list("abcabcabc")}},
            "run from nan to nan",
        ),
        ({"iteration": 5}, "did you mean iterations"),
        ({"steps": 2.0}, "steps = 2.0: a whole number"),
        ({"batch": "4"}, "batch = '4': a whole number"),
        ({"resume": True, "seed": True}, "seed = True: a whole number"),
        ({"lr": math.nan}, "lr = nan: a finite number"),
        ({"guidance": math.inf}, "guidance = inf: a finite number"),
        ({"features": 3}, "features = 3: a name"),
        ({"prompts": []}, "a text or several"),
        ({"prompts": ["a", 3]}, "a text or several"),
        ({"prompts": 3}, "a text or several"),
    ):
        with pytest.raises(InputError, match=text):
            distill(teacher(), **{"cpu": True, **wrong})


def test_one_prompt_is_no_list_of_its_letters() -> None:
    """'ab' is one text, which this model does not know; its letters would be two classes that it does."""
    with pytest.raises(InputError, match="'ab'"):
        distill(teacher(), prompts="ab", **QUICK)
    one, same = (distill(teacher(), steps=2, prompts=p, scores=False, **QUICK).denoiser for p in ("a", ["a"]))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("method", ["segments", "lcm-lora", "boot", "slimflow", "mmd-ddm"])
def test_text_pipelines_of_diffusers_learn_the_prompts_they_are_given(method: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import sfumato as sf
    from sfumato.interop import tiny

    pipeline = sf.from_diffusers(tiny.pipeline("sd"))
    steps, options = 1 if METHODS[method].once else 2, {**QUICK, "iterations": 2}
    if METHODS[method].reads == "data":
        options["data"] = {
            "x": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8),
            "prompt": ["a cat", "a boat"] * 2,
        }
    else:
        with pytest.raises(InputError, match="give the prompts"):
            distill(pipeline, method, steps, **QUICK)
    made = distill(pipeline, method, steps, prompts=["a cat", "a red boat"], guidance=3.0, out=tmp_path, **options)
    assert made.guidance == 1.0 and made.source.unet is made.denoiser.net.model  # type: ignore[attr-defined]
    ours, before = (dict(p.source.unet.named_parameters()) for p in (made, pipeline))  # type: ignore[attr-defined]
    assert set(ours) == set(before) and any(
        ours[k].shape != v.shape or not torch.equal(ours[k], v) for k, v in before.items()
    )
    drawn = made.generate(["a cat"], seed=1)
    assert drawn.shape == pipeline.generate(["a cat"], steps=2, seed=1).shape
    again = sf.from_diffusers(tmp_path / "pipeline")
    assert again.steps == steps and again.card["method"] == method
    assert torch.equal(drawn, again.generate(["a cat"], seed=1))
    if method == "lcm-lora":
        return  # draws noise, which the diffusers pipeline takes from its own generator
    alone = again.source(  # type: ignore[attr-defined]
        ["a cat"], num_inference_steps=steps, guidance_scale=1.0, latents=_start(again), output_type="pt"
    ).images
    assert (alone.mul(255).round() - drawn.float()).abs().max() <= 1  # the diffusers pipeline itself


def _start(pipeline: Pipeline) -> Tensor:
    """The noise of item 0 of seed 1."""
    return pipeline.process.prior((1, *pipeline.codec.shape(*pipeline.size)), Context.of(1, 1))  # type: ignore[no-any-return]


def test_a_student_that_draws_a_latent_is_exported_to_diffusers_and_its_latent_follows_the_seed() -> None:
    pytest.importorskip("diffusers")
    from sfumato.interop import to_diffusers

    made = distill(teacher(), "ddgan", 1, **given("ddgan"), **QUICK)
    nn.init.normal_(made.denoiser.net.project.weight)  # after so few updates the latent has hardly an effect
    pipe = to_diffusers(made)
    first, again, other = (pipe(["a", "b"], seed=s, output_type="pt").images for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    latents = torch.randn(2, 1, 4, 4)
    one, two = (
        pipe(["a", "b"], latents=latents, generator=torch.Generator().manual_seed(s), output_type="pt").images
        for s in (1, 2)
    )
    assert not torch.equal(one, two)
