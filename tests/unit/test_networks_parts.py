"""Conditions, attention, positions and the recursive U-Net, against what defines them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.core import Context, tapped
from sfumato.core.errors import InputError
from sfumato.networks import DiT, UNet
from sfumato.networks.autoencoder import AutoencoderKL, Moments
from sfumato.networks.conditions import LabelEmbedding, Tokens, sinusoidal
from sfumato.networks.dit import Block, rotary_positions
from sfumato.networks.layers import Attention, ImageAttention, ResidualBlock, rotate

READS = {"context_channels": 24, "vector_channels": 20, "extra_channels": 2}
READS |= {"embeddings": {"y": 5, "vendor": 3}, "scalars": {"target": 1000.0}}
SMALL = {"width": 32, "depth": 2, "heads": 2, "size": 8}
CASES: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "unet": (partial(UNet, 3, width=16, multipliers=(1, 2, 2), blocks=(2, 1, 1), patch=2, **READS), 3, 16),
    "dit": (partial(DiT, 4, patch=2, **SMALL, **READS), 4, 8),
    "dit-shared": (partial(DiT, 4, patch=1, modulation="shared", **SMALL, **READS), 4, 8),
}
BOTH = list(CASES)


def perturbed(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net.eval()


def made(case: str, batch: int = 3) -> tuple[Any, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """A network whose zero-initialised layers are perturbed, (x, label), and a value of each condition."""
    torch.manual_seed(0)
    build, channels, size = CASES[case]
    args = torch.randn(batch, channels, size, size), torch.rand(batch)
    cond = {"text": torch.randn(batch, 6, 24), "text_mask": torch.arange(6) < torch.randint(0, 7, (batch, 1))}
    cond |= {"vector": torch.randn(batch, 20), "image": torch.randn(batch, 2, size, size)}
    cond |= {"y": torch.randint(0, 6, (batch,)), "vendor": torch.randint(0, 4, (batch,)), "target": torch.rand(batch)}
    return perturbed(build()), args, cond


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    layer, x, tokens = Attention(8, 2, 6).double(), torch.randn(2, 5, 8).double(), torch.randn(2, 3, 6).double()
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    for item in range(2):
        kept = tokens[item, mask[item]]
        rows = []
        for head in (slice(0, 4), slice(4, 8)):
            q = F.layer_norm(layer.query(x[item])[:, head], (4,), eps=1e-6)
            k = F.layer_norm(layer.key(kept)[:, head], (4,), eps=1e-6)
            weights = torch.exp(q @ k.T / math.sqrt(4))
            rows.append(weights / weights.sum(1, keepdim=True) @ layer.value(kept)[:, head])
        want = layer.out(torch.cat(rows, 1))
        got = layer(x, Tokens(tokens, mask[:, None, None]))[item]
        torch.testing.assert_close(got, want)


def test_probabilities_are_read_and_replaced_by_taps_of_one_call() -> None:
    net, args, cond = made("dit")
    plain, seen = net(*args, **cond), []

    def ask(ctx: Context, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        return call(*args, **{**kwargs, "explicit": True})

    def read(ctx: Context, call: Any, p: Tensor) -> Tensor:
        seen.append(p)
        return call(p)

    def first_only(ctx: Context, call: Any, p: Tensor) -> Tensor:
        return F.one_hot(torch.zeros(p.shape[:-1], dtype=torch.long), p.shape[-1]).to(p)

    path = "blocks.1.cross"
    with tapped(net, Context(taps=((path, ask), (f"{path}.probabilities", read)))):
        torch.testing.assert_close(net(*args, **cond), plain, atol=2e-6, rtol=2e-5)
    assert seen[0].shape == (3, 2, 16, 7)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(3, 2, 16))
    assert (seen[0][..., 1:] * ~cond["text_mask"][:, None, None]).abs().max() == 0
    with tapped(net, Context(taps=(("blocks.0.cross", ask), (path, ask), ("blocks.0.cross.probabilities", first_only),
                                   (f"{path}.probabilities", first_only)))):  # fmt: skip
        replaced = net(*args, **cond)
    # all weight on the null token is what an absent text gives
    absent = {k: v for k, v in cond.items() if k not in ("text", "text_mask")}
    torch.testing.assert_close(replaced, net(*args, **absent), atol=2e-6, rtol=2e-5)


def test_derivatives_that_fused_attention_lacks() -> None:
    net, (x, label), _ = made("dit", batch=1)
    for module in net.modules():
        if isinstance(module, Attention):
            module.explicit = True
    net, x, label = net.double(), x.double(), label.double()
    direction, step = torch.randn_like(x), 1e-6
    _, slope = torch.func.jvp(lambda a: net(a, label), (x,), (direction,))
    numeric = (net(x + step * direction, label) - net(x - step * direction, label)) / (2 * step)
    torch.testing.assert_close(slope, numeric, atol=1e-6, rtol=1e-6)


def test_residual_branches_start_as_the_identity() -> None:
    torch.manual_seed(0)
    x, tokens, condition = torch.randn(2, 16, 4, 4), torch.randn(2, 5, 16), torch.randn(2, 16)
    text = Tokens(torch.randn(2, 3, 6), None)
    rotary = rotary_positions(1, 5, 8, tokens)
    assert torch.equal(ResidualBlock(16, embedding=16)(x, condition), x)
    torch.testing.assert_close(ImageAttention(16, 2, 6)(x, text), x)
    for shared in (False, True):
        given = torch.zeros(2, 96) if shared else condition
        assert torch.equal(Block(16, 2, 4.0, 6, shared)(tokens, given, text, rotary), tokens)


def test_sinusoids() -> None:
    label, width = torch.tensor([0.0, 3.5]).double(), 6
    got = sinusoidal(label, width)
    for i, value in enumerate(label.tolist()):
        angles = [value * 10_000 ** (-2 * k / width) for k in range(3)]
        want = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(got[i], torch.tensor(want).double())
    embed = LabelEmbedding(8)
    # a label keeps its digits: neighbours of 1/1000 are told apart in every network precision
    out = embed.bfloat16()(torch.tensor([0.500, 0.501]))
    assert out.dtype == torch.bfloat16 and not torch.equal(out[0], out[1])
    coarse = torch.tensor([0.3, 0.7]).bfloat16()
    assert torch.equal(embed(coarse), embed(coarse.float()))


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_rotary_scores_depend_on_the_offset_only(row: int, column: int, down: int, right: int) -> None:
    rotary = rotary_positions(12, 12, 16, torch.zeros(1, dtype=torch.float64))
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).double().expand(2, 1, 1, 144, 16)
    scores = (
        (rotate(q, rotary) @ rotate(k, rotary).transpose(-2, -1))[0, 0].unflatten(0, (12, 12)).unflatten(2, (12, 12))
    )
    here, there = scores[0, 0, down, right], scores[row, column, row + down, column + right]
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)
    assert (here - scores[0, 0, 0, 0]).abs() > 1e-6 or (down, right) == (0, 0)
    assert (here - scores[0, 0, right, down]).abs() > 1e-6 or down == right
    plain = (q[0, 0, 0] * k[0, 0, 0]).sum()
    torch.testing.assert_close(scores[row, column, row, column], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", BOTH)
def test_masked_tokens_change_nothing(case: str) -> None:
    net, args, cond = made(case)
    cond["text_mask"] = torch.arange(6) < torch.tensor([[0], [2], [5]])
    plain = net(*args, **cond)
    noisy = torch.where(cond["text_mask"][..., None], cond["text"], 1e3 * torch.randn_like(cond["text"]))
    assert torch.equal(net(*args, **{**cond, "text": noisy}), plain)
    shorter = {**cond, "text": cond["text"][:, :5], "text_mask": cond["text_mask"][:, :5]}
    torch.testing.assert_close(net(*args, **shorter), plain, atol=2e-6, rtol=2e-5)
    seen = net(*args, **{**cond, "text": cond["text"] + 1.0})
    assert torch.equal(seen[0], plain[0]) and not torch.allclose(seen[1], plain[1])


@pytest.mark.parametrize("case", BOTH)
def test_an_absent_condition_is_its_null(case: str) -> None:
    net, args, cond = made(case)
    null = {
        "text": torch.randn_like(cond["text"]),
        "text_mask": torch.zeros(3, 6, dtype=torch.bool),
        "vector": torch.zeros(3, 20),
        "image": torch.zeros_like(cond["image"]),
        "y": torch.full((3,), 5),
        "vendor": torch.full((3,), 3),
    }
    torch.testing.assert_close(net(*args, **null), net(*args), atol=2e-6, rtol=2e-5)
    whole = net(*args, **cond)
    for names in (("text", "text_mask"), ("vector",), ("image",), ("target",)):
        assert not torch.allclose(net(*args, **{k: v for k, v in cond.items() if k not in names}), whole)


@pytest.mark.parametrize("case", BOTH)
def test_every_class_and_the_null_class_differ(case: str) -> None:
    net, args, _ = made(case, batch=1)
    outputs = torch.cat([net(*args, y=torch.tensor([i])) for i in range(6)])
    assert torch.pdist(outputs.flatten(1)).min() > 1e-4
    with pytest.raises(IndexError):
        net(*args, y=torch.tensor([6]))


def test_a_further_scalar_starts_without_effect() -> None:
    torch.manual_seed(0)
    old = perturbed(UNet(1, width=8, multipliers=(1, 2), attention=True))
    new = UNet(1, width=8, multipliers=(1, 2), attention=True, scalars={"guidance": 1.0})
    absent = new.load_state_dict(old.state_dict(), strict=False)
    assert all("guidance" in name for name in absent.missing_keys)
    x, label = torch.randn(2, 1, 4, 4), torch.rand(2)
    torch.testing.assert_close(new(x, label, guidance=torch.tensor([3.0, 7.5])), old(x, label))


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({"y": torch.zeros(3)}, "int64"),
        ({"y": torch.zeros(2, dtype=torch.long)}, "int64"),
        ({"style": torch.zeros(3)}, "style"),
        ({"text": torch.zeros(3, 4, 23)}, "length, 24"),
        ({"text_mask": torch.zeros(3, 4, dtype=torch.bool)}, "without text"),
        ({"text": torch.zeros(3, 4, 24), "text_mask": torch.zeros(3, 4)}, "bool"),
        ({"image": torch.zeros(3, 2, 4, 4)}, "image"),
    ],
)
@pytest.mark.parametrize("case", BOTH)
def test_wrong_conditions_are_refused(case: str, cond: dict, message: str) -> None:
    net, args, _ = made(case)
    with pytest.raises(InputError, match=message):
        net(*args, **cond)


@given(st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_any_size_runs_or_is_refused(height: int, width: int) -> None:
    cases = [
        (UNet(2, width=8, multipliers=(1, 1), attention=False, patch=2), 4),
        (DiT(2, patch=2, width=16, depth=1, heads=2), 2),
    ]
    for net, multiple in cases:
        x, label = torch.randn(1, 2, height, width), torch.rand(1)
        if height % multiple or width % multiple:
            with pytest.raises(InputError, match=f"divisible by {multiple}"):
                net(x, label)
        else:
            assert net(x, label).shape == x.shape


def test_label_needs_one_number_an_item() -> None:
    for net in (UNet(1, width=8, multipliers=(1,), attention=False), DiT(1, width=16, depth=1, heads=2)):
        with pytest.raises(InputError, match="label"):
            net(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1))


def test_replacing_deep_skips_everything_below_a_resolution() -> None:
    net, args, cond = made("unet")
    kept, ran = [], []

    def keep(ctx: Context, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        kept.append(call(*args, **kwargs))
        return kept[-1]

    def reuse(ctx: Context, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        return kept[0]

    plain = net(*args, **cond)
    with tapped(net, Context(taps=(("level.deep", keep),))):
        assert torch.equal(net(*args, **cond), plain)
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with tapped(net, Context(taps=(("level.deep", reuse),))):
        assert torch.equal(net(*args, **cond), plain)
    assert not [name for name in ran if name.startswith("level.deep")]


def test_the_bottleneck_has_a_path() -> None:
    net, args, cond = made("unet")
    assert net.bottleneck_path == "level.deep.deep.deep"
    shape = []

    def shift(ctx: Context, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        hidden = call(*args, **kwargs)
        shape.append(tuple(hidden.shape))
        return hidden + 1.0

    plain = net(*args, **cond)
    with tapped(net, Context(taps=((net.bottleneck_path, shift),))):
        assert not torch.allclose(net(*args, **cond), plain)
    assert shape == [(3, 32, 2, 2)]


def test_conditioned_head_adds_a_multiple_of_the_input() -> None:
    torch.manual_seed(0)
    net = UNet(3, width=16, multipliers=(1, 2), attention=False, patch=2, extra_channels=1, head="conditioned")
    with torch.no_grad():
        net.carry.bias.copy_(torch.arange(12.0))  # type: ignore[union-attr]
    x, image = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)
    factors = F.pixel_shuffle(torch.arange(12.0).reshape(1, 12, 1, 1), 2).repeat(1, 1, 4, 4)
    torch.testing.assert_close(net(x, torch.rand(2), image=image), factors * x)
    plain = UNet(3, width=16, multipliers=(1, 2), attention=False, patch=2, extra_channels=1)
    assert plain.load_state_dict(net.state_dict(), strict=False).missing_keys == []


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    net = perturbed(UNet(1, width=8, multipliers=(1,), attention=False, dropout=0.5)).train()
    x, label = torch.randn(2, 1, 4, 4), torch.rand(2)
    assert not torch.equal(net(x, label), net(x, label))
    assert torch.equal(net.eval()(x, label), net(x, label))


def test_moments_are_a_gaussian() -> None:
    torch.manual_seed(0)
    moments = Moments(torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double())
    ours = torch.distributions.Normal(moments.mean, (0.5 * moments.logvar).exp())
    kl = torch.distributions.kl_divergence(ours, torch.distributions.Normal(torch.zeros_like(ours.mean), 1.0))
    torch.testing.assert_close(moments.kl(), kl.sum((1, 2, 3)))
    noise = torch.randn(20_000, 2, 4, 4).double()
    draws = Moments(moments.mean[:1], moments.logvar[:1]).sample(noise)
    torch.testing.assert_close(draws, ours.mean[:1] + ours.stddev[:1] * noise)


def test_autoencoder_clips_log_variance_and_samples_on_request() -> None:
    torch.manual_seed(0)
    net, x = AutoencoderKL(factor=4, width=8), torch.randn(2, 3, 8, 8)
    noise = torch.randn(2, 4, 2, 2)
    mean, logvar = net.encode(x)
    torch.testing.assert_close(net(x, noise=noise), net.decode(mean + (0.5 * logvar).exp() * noise))
    assert torch.equal(net(x), net.decode(mean))
    with torch.no_grad():
        net.encoder.output.bias[4:] = 1e3
    assert (net.encode(x).logvar == 20).all()
    with torch.no_grad():
        net.encoder.output.bias[4:] = -1e3
    assert (net.encode(x).logvar == -30).all()


def test_impossible_shapes_are_refused_when_built() -> None:
    with pytest.raises(InputError, match="factor 6"):
        AutoencoderKL(factor=6)
    with pytest.raises(InputError, match="3 levels"):
        AutoencoderKL(factor=8, multipliers=(1, 2))
    with pytest.raises(InputError, match="give one a level"):
        UNet(3, multipliers=(1, 2), blocks=(1, 1, 1))
    with pytest.raises(InputError, match="ignored"):
        UNet(3, attention=False, context_channels=8)
    with pytest.raises(InputError, match="'conditioned'"):
        UNet(3, head="linear")
    with pytest.raises(InputError, match="heads"):
        UNet(3, width=10, multipliers=(1,), attention=True)
    with pytest.raises(InputError, match="divisible by 4"):
        DiT(3, width=100, heads=3)
    with pytest.raises(InputError, match="'shared'"):
        DiT(3, modulation="film")


@pytest.mark.parametrize("case", BOTH)
def test_conditions_reach_the_output_through_their_own_path(case: str) -> None:
    net, args, cond = made(case)
    assert net.accepts - {"active"} == set(cond)
    for name, value in cond.items():
        if value.is_floating_point():
            value.requires_grad_()
            net(*args, **{name: value}).sum().backward()
            assert value.grad.abs().max() > 0
