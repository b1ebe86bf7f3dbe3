"""The study of compression: the same network and the same number of multiply-adds for every factor."""

from __future__ import annotations

import pytest
import torch

from sfumato.core import InputError
from sfumato.pipeline import load
from sfumato.recipes import latent_diffusion as study
from sfumato.zoo import make_latent_study as make


def test_multiply_adds_are_those_of_the_products():
    linear, convolution = torch.nn.Linear(7, 5), torch.nn.Conv2d(2, 3, 3, padding=1)
    assert make.multiply_adds(lambda: linear(torch.zeros(4, 7))) == 4 * 7 * 5
    assert make.multiply_adds(lambda: convolution(torch.zeros(1, 2, 6, 6))) == 9 * 2 * 3 * 36


def test_the_network_is_the_same_but_for_its_channels_and_costs_about_a_quarter_a_halving():
    nets = {f: make.denoiser(f) for f in make.FACTORS}
    inner = {f: [p.shape for n, p in net.named_parameters() if "level" in n] for f, net in nets.items()}
    assert all(inner[f] == inner[1] for f in make.FACTORS)
    costs = [make.evaluation(nets[f], f) for f in make.FACTORS]
    assert all(0.25 <= b / a <= 0.28 for a, b in zip(costs, costs[1:], strict=False))


def test_a_category_is_one_token():
    cond = make.conditions(torch.tensor([3, 0]))
    assert cond["text"].shape == (2, 1, make.CLASSES) and cond["text_mask"].all()
    assert cond["text"].argmax(-1).flatten().tolist() == [3, 0] and (cond["text"].sum(-1) == 1).all()


def test_other_factors_have_no_codec(tmp_path):
    with pytest.raises(InputError, match="one of 2, 4, 8"):
        make.make_codec(tmp_path, factor=16)


@pytest.mark.parametrize("factor", make.FACTORS)
def test_bundled_models_were_taught_for_the_budget_to_within_a_batch(factor):
    pipeline = load(f"emoji-study/f{factor}")
    step = 3 * make.evaluation(pipeline.denoiser, factor) * make.BATCH[factor]
    assert pipeline.card["steps"] * step == pytest.approx(make.BUDGET, abs=step / 2)
    assert pipeline.card["images seen"] == pipeline.card["steps"] * make.BATCH[factor]
    assert pipeline.codec.shape(32, 32) == ((3, 32, 32) if factor == 1 else (4, 32 // factor, 32 // factor))


def test_the_class_that_is_asked_for_reaches_the_image_through_cross_attention():
    denoiser = load("emoji-study/f4").denoiser
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7, 0.7])
    one, other = (denoiser.net(x, t, **make.conditions(torch.full((2,), c))) for c in (3, 6))
    masked = {**make.conditions(torch.full((2,), 3)), "text_mask": torch.zeros(2, 1, dtype=torch.bool)}
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.allclose(denoiser.net(x, t, **masked), denoiser.net(x, t), atol=1e-5)


def test_a_mosaic_has_a_class_a_column():
    category = torch.arange(10).repeat(3)
    images = category.to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    shown = study.mosaic(images, category)
    assert shown.shape == (2 * 34, len(study.CLASSES) * 34, 3)
    assert [shown[16, 34 * i + 16, 0] for i in range(len(study.CLASSES))] == list(study.CLASSES)
