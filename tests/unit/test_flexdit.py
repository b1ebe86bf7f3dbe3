"""FlexDiT: it is the network it inherits from where nothing is sparse, by hand where something is, and counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato as sf
from sfumato import processes
from sfumato.acceleration import deepcache, operations, region_adaptive, token_merging
from sfumato.core import InputError
from sfumato.guidance import cfg
from sfumato.networks import DiT, FlexDiT, inherit
from sfumato.networks.flexdit import Join, Pooled
from sfumato.networks.layers import Attention

OPTIONS = {"size": 8, "patch": 1, "width": 32, "heads": 2, "embeddings": {"y": 3}, "context_channels": 6}


def perturbed(net, size=0.1):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(size * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def dense(depth=6, **options):
    torch.manual_seed(0)
    return perturbed(DiT(2, depth=depth, **{**OPTIONS, **options}))


def given_to(n=3, side=8):
    torch.manual_seed(1)
    cond = {
        "y": torch.arange(n) % 3,
        "text": torch.randn(n, 4, 6),
        "text_mask": torch.arange(4) <= torch.arange(n)[:, None],
    }
    return (torch.randn(n, 2, side, side), torch.linspace(0.05, 0.95, n)), cond


def work(net, **options):
    args, cond = given_to(**options)
    return operations(lambda: net(*args, **cond))


def test_a_layout_of_dense_blocks_only_is_the_inherited_network():
    args, cond = given_to()
    dit = dense()
    for modules in ((), ((0, 0, 0, 4),), ((0, 0, 0, 2), (0, 0, 0, 2))):  # a module's join starts as the identity
        net = inherit(FlexDiT.like(dit, pooling=0, modules=modules, dense=6 - 4 * bool(modules)), dit)
        torch.testing.assert_close(net(*args, **cond), dit(*args, **cond), atol=1e-6, rtol=1e-5)


def test_a_module_as_dense_as_the_grid_is_the_inherited_network_but_for_what_is_not_joined():
    """With s the side of the grid the pooling is the identity; merge and recover attend to the tokens they are."""
    args, cond = given_to()
    dit = dense()
    net = inherit(FlexDiT.like(dit, pooling=0, modules=((1, 2, 0, 1),), dense=2, levels=(8,)), dit)
    join = net.joins[0]
    join.up.weight.data, join.keep.weight.data = torch.eye(32), torch.zeros(32, 32)
    torch.testing.assert_close(net(*args, **cond), dit(*args, **cond), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("module", [(1, 2, 0, 1), (1, 3, 1, 0), (0, 4, 1, 1)])
def test_with_changes_joined_a_module_as_dense_as_the_grid_is_the_inherited_network(module):
    """Nothing is to be learnt before the tokens get fewer: the start that `join` = "copy" does not have."""
    args, cond = given_to()
    dit = dense()
    layout = {"pooling": 0, "modules": (module,), "dense": 6 - sum(module), "levels": (8,)}
    net = inherit(FlexDiT.like(dit, **layout, join="change"), dit)
    torch.testing.assert_close(net(*args, **cond), dit(*args, **cond), atol=1e-5, rtol=1e-4)
    copied = inherit(FlexDiT.like(dit, **layout), dit)
    with torch.no_grad():
        assert float((copied(*args, **cond) - dit(*args, **cond)).norm()) > 0.01 * float(dit(*args, **cond).norm())


def test_changes_of_tokens_that_are_alike_lose_nothing_by_pooling():
    """Where all tokens of a cell are equal, so is what is done to them, and joining gives it back."""
    join, z, y = Join(4, open=True), torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    dense_tokens = F.interpolate(y.mT.unflatten(2, (2, 2)), scale_factor=2).flatten(2).mT
    expected = F.interpolate(z.mT.unflatten(2, (2, 2)), scale_factor=2).flatten(2).mT
    torch.testing.assert_close(join(z - y, dense_tokens, (2, 2), (4, 4)), expected)


def test_a_recovering_block_at_full_density_is_an_ordinary_one():
    args, cond = given_to()
    dit = dense()
    net = inherit(FlexDiT.like(dit, pooling=0, modules=((0, 0, 1, 0),), dense=5, levels=(8,)), dit)
    torch.testing.assert_close(net(*args, **cond), dit(*args, **cond), atol=1e-6, rtol=1e-5)


def test_pooling_is_attention_with_equal_weights():
    attention, pooled, x = Attention(16, 2), Pooled(16), torch.randn(2, 5, 16)
    pooled.load_state_dict({k: v for k, v in attention.state_dict().items() if k.split(".")[0] in ("value", "out")})
    attention.query.weight.data.zero_(), attention.query.bias.data.zero_()
    torch.testing.assert_close(pooled(x).expand(-1, 5, -1), attention(x), atol=1e-6, rtol=1e-5)


def test_joining_adds_each_cell_to_the_tokens_it_stands_for():
    join, sparse, y = perturbed(Join(4)), torch.randn(2, 4, 4), torch.randn(2, 12, 4)
    out = join(sparse, y, (2, 2), (3, 4))
    for row in range(3):
        for column in range(4):
            cell = (row * 2 // 3) * 2 + column * 2 // 4
            expected = F.linear(sparse[:, cell], join.up.weight) + F.linear(y[:, row * 4 + column], join.keep.weight)
            torch.testing.assert_close(out[:, row * 4 + column], expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    levels=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    labels=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
)
def test_an_item_depends_on_its_own_label_only(levels, labels):
    torch.manual_seed(0)
    net = perturbed(FlexDiT(2, pooling=1, modules=((1, 1, 1, 0),), dense=1, levels=levels, **OPTIONS))
    (x, _), cond = given_to()
    whole = net(x, torch.tensor(labels), **cond)
    for i in range(3):
        alone = net(x[i : i + 1], torch.tensor(labels[i : i + 1]), **{k: v[i : i + 1] for k, v in cond.items()})
        torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=1e-4)


def test_density_is_a_function_of_the_label():
    layout = {"pooling": 1, "modules": ((1, 2, 1, 0),), "dense": 1}
    torch.manual_seed(0)
    timed = perturbed(FlexDiT(2, **layout, levels=(2, 4, 8), bounds=(0.6, 0.2), **OPTIONS))
    (x, _), cond = given_to()
    for label, level in [(1.0, 2), (0.6, 2), (0.59, 4), (0.2, 4), (0.1, 8), (0.0, 8)]:
        fixed = FlexDiT(2, **layout, levels=(level,), **OPTIONS).eval()
        fixed.load_state_dict(timed.state_dict())
        at = torch.full((3,), label)
        assert torch.equal(timed(x, at, **cond), fixed(x, at, **cond))
    assert FlexDiT(2, **layout, levels=(2, 4, 5, 8), **OPTIONS).bounds == (0.75, 0.5, 0.25)


def test_other_sizes_have_as_large_a_share_of_their_grid():
    net = perturbed(FlexDiT(2, levels=(4,), **OPTIONS))
    for size in ((8, 8), (16, 16), (8, 12), (6, 10), (1, 1)):
        out = net(torch.randn(2, 2, *size), torch.rand(2))
        assert out.shape == (2, 2, *size) and torch.isfinite(out).all()


def test_work_is_as_counted_by_hand():
    n, s, d, text = 64, 16, 32, 5
    hidden = DiT(2, depth=1, **OPTIONS).blocks[0].mlp.gate.out_features

    def block(q, k):  # queries; keys: the projections, the two products of attention, the text, the MLP
        return (
            2 * q * d * d
            + 2 * k * d * d
            + 2 * q * k * d
            + 2 * (q + text) * d * d
            + 2 * q * text * d
            + 3 * q * d * hidden
        )

    kinds = {"pool": (8, 0, 0), "merge": (0, s, n), "sparse": (0, s, s), "recover": (0, n, s), "dense": (0, n, n)}
    layout = FlexDiT(2, pooling=2, modules=((1, 3, 1, 1),), dense=2, levels=(4,), **OPTIONS)
    plain = DiT(2, depth=10, **OPTIONS)
    common = work(plain, n=1) - 2 * 10 * (block(n, n) + 6 * d * d)  # 6 d^2: the modulation
    pool = 2 * d * d + 2 * (n + text) * d * d + 2 * n * text * d + 3 * n * d * hidden
    blocks = 2 * pool + sum(
        m * block(*kinds[k][1:]) for k, m in (("merge", 1), ("sparse", 3), ("recover", 1), ("dense", 3))
    )
    assert work(layout, n=1) == common + 2 * (blocks + 60 * d * d + (n + s) * d * d)  # and the join
    assert work(layout, n=1) < 0.7 * work(plain, n=1)


def test_fewer_layers_inherit_evenly():
    dit = dense(7)
    net = inherit(DiT(2, depth=3, **OPTIONS), dit)
    for ours, theirs in enumerate((0, 3, 6)):
        assert torch.equal(net.blocks[ours].mlp.up.weight, dit.blocks[theirs].mlp.up.weight)
    assert torch.equal(net.final.project.weight, dit.final.project.weight)
    assert net.blocks[0].mlp.up.weight.data_ptr() != dit.blocks[0].mlp.up.weight.data_ptr()


def test_it_samples_under_guidance():
    dit = dense()
    d = sf.parametrized(
        inherit(FlexDiT.like(dit, modules=((1, 1, 1, 1),), levels=(2, 4)), dit).eval(),
        processes.Flow(),
        "flow",
        null={"y": 3},
    )
    options = {"solver": "heun", "steps": 4, "seed": 3}
    with torch.no_grad():
        three = sf.sample(cfg(2.0)(d), shape=(3, 2, 8, 8), cond={"y": torch.arange(3)}, **options)
        one = sf.sample(cfg(2.0)(d), shape=(1, 2, 8, 8), cond={"y": torch.arange(1)}, **options)
    torch.testing.assert_close(three[:1], one, atol=1e-5, rtol=1e-4)


def test_tokens_of_its_blocks_are_merged_but_where_attention_is_a_mean():
    net, seen = perturbed(FlexDiT(2, modules=((1, 1, 1, 0),), **OPTIONS)), []
    for block in net.blocks[1:]:
        block.attention.query.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    d = sf.parametrized(net, processes.Flow(), "flow")
    with torch.no_grad():
        token_merging(0.5, spare=0)(d)(torch.randn(2, 2, 8, 8), 0.5, sf.Context.of(2))
    assert seen == [8, 8, 32, 32]


def test_refusals():
    dit = dense()
    (x, label), cond = given_to()
    flex = FlexDiT.like(dit, modules=((1, 1, 1, 1),))
    for call, said in [
        (lambda: inherit(flex, dense(5)), "6 layers cannot inherit from 5"),
        (lambda: inherit(FlexDiT.like(dit, modules=()), dit), "2 layers"),
        (lambda: inherit(flex, dense(width=16)), "inherits"),
        (lambda: FlexDiT(2, modules=((1, 2, 1),)), "four numbers"),
        (lambda: FlexDiT(2, modules=((0, 0, 0, 0),)), "four numbers"),
        (lambda: FlexDiT(2, depth=4), "layout"),
        (lambda: FlexDiT(2, join="odd"), "'copy' or 'change'"),
        (lambda: FlexDiT(2, levels=(9,), **OPTIONS), "1 to 8"),
        (lambda: FlexDiT(2, levels=(), **OPTIONS), "levels"),
        (lambda: FlexDiT(2, levels=(2, 4), bounds=(0.5, 0.2), **OPTIONS), "bounds"),
        (lambda: FlexDiT(2, levels=(2, 4, 8), bounds=(0.2, 0.5), **OPTIONS), "bounds"),
        (lambda: flex(x, label, active=torch.zeros(3, 2, dtype=torch.int64), **cond), "active"),
        (
            lambda: deepcache()(sf.parametrized(FlexDiT.like(dit, levels=(2, 4)), processes.Flow(), "flow")),
            "nothing to keep",
        ),
        (lambda: region_adaptive()(sf.parametrized(flex, processes.Flow(), "flow")), "FlexDiT"),
    ]:
        with pytest.raises(InputError, match=said):
            call()
