"""Codecs: round trips, scale and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from sfumato import codecs
from sfumato.core import Context
from sfumato.core.errors import InputError
from sfumato.networks import AutoencoderKL


@pytest.fixture
def kl() -> codecs.KL:
    torch.manual_seed(0)
    return codecs.KL(AutoencoderKL(factor=4, width=8))


def photos(n: int = 6, size: int = 16) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def test_every_level_of_a_pixel_survives() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    codec = codecs.Identity(channels=1)
    x = codec.encode(levels)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert torch.equal(codec.images(x), levels)
    assert torch.equal(codec.images(x.bfloat16().float()), codecs.to_uint8(x.bfloat16()))
    assert torch.equal(codec.decode(codec.encode(x)), x)
    assert codec.shape(16, 24) == (1, 16, 24)


def test_pixels_out_of_range_show_as_the_end_of_it() -> None:
    x = torch.tensor([-7.0, -1.0, -0.999, 0.0, 0.999, 1.0, 7.0])
    assert codecs.to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_wrong_dtypes_are_refused(kl: codecs.KL) -> None:
    for codec in (kl, codecs.Identity()):
        with pytest.raises(InputError, match="uint8"):
            codec.encode(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    with pytest.raises(InputError, match="floats"):
        codecs.to_uint8(photos())


def test_fitted_codes_have_unit_std_and_decode_undoes_the_scale(kl: codecs.KL) -> None:
    images = photos()
    raw = kl.autoencoder.encode(codecs.to_float(images)).mean
    assert kl.fit_scale(images, batch=4) is kl
    x = kl.encode(images)
    assert x.shape[1:] == kl.shape(16, 16)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(kl.decode(x), kl.autoencoder.decode(raw), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kl.encode(codecs.to_float(images)), x)
    assert kl.images(x).dtype == torch.uint8


def test_noise_comes_from_the_context_and_only_from_it(kl: codecs.KL) -> None:
    images = photos(3)
    mean = kl.encode(images)
    assert torch.equal(mean, kl.encode(images, Context.of(3, seed=None)))
    assert torch.equal(kl.encode(images, Context.of(3, seed=5)), kl.encode(images, Context.of(3, seed=5)))
    drawn = kl.encode(images, Context.of(3, seed=5))
    moments = kl.autoencoder.encode(codecs.to_float(images))
    noise = Context.of(3, seed=5).rng.normal(moments.mean)
    torch.testing.assert_close(drawn - mean, (0.5 * moments.logvar).exp() * noise, atol=1e-5, rtol=1e-4)
    alone = kl.encode(images[:1], Context.of(1, seed=5))
    torch.testing.assert_close(alone[0], drawn[0], atol=1e-5, rtol=1e-5)


def test_sides_must_be_multiples_of_the_factor(kl: codecs.KL) -> None:
    with pytest.raises(InputError, match="divisible by 4"):
        kl.encode(photos(1, 18))
    with pytest.raises(InputError, match="multiples of 4"):
        kl.shape(16, 18)


def test_a_code_that_does_not_vary_is_refused_and_leaves_the_scale(kl: codecs.KL) -> None:
    with pytest.raises(ValueError, match="1e-6"):
        with torch.no_grad():
            kl.autoencoder.encoder.output.weight[1].zero_()
        kl.fit_scale(photos())
    assert torch.equal(kl.std, torch.ones(4, 1, 1)) and torch.equal(kl.mean, torch.zeros(4, 1, 1))
    with pytest.raises(InputError, match="at least one"):
        kl.fit_scale(photos(0))


def test_json_and_weights_rebuild_a_codec(kl: codecs.KL) -> None:
    kl.fit_scale(photos())
    for codec in (kl, codecs.Identity(channels=3)):
        name, config = json.loads(json.dumps([codec.codec_name, codec.config]))
        other = codecs.build(name, config)
        other.load_state_dict(load(save(codec.state_dict())))
        assert torch.equal(other.encode(photos(2)), codec.encode(photos(2)))
    assert codecs.names() == ["identity", "kl"]


def test_decoding_is_differentiable_beyond_the_range(kl: codecs.KL) -> None:
    x = torch.full((1, 4, 4, 4), 3.0, requires_grad=True)
    (100 * kl.decode(x)).sum().backward()
    assert x.grad.abs().max() > 0
