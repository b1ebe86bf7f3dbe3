"""Eight bits on other engines, the operations of integers, and what is kept from one opening to the next."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

import sfumato as sf
from sfumato import acceleration, files, networks, processes
from sfumato.acceleration import Calibration, denoised, int8, operations, quantized
from sfumato.acceleration.engines import Session
from sfumato.acceleration.keeping import digest, kept
from sfumato.core import Context, InputError
from sfumato.denoisers.features import features
from sfumato.guidance import cfg


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


def denoiser(name="dit"):
    torch.manual_seed(0)
    if name == "unet":
        net = networks.UNet(2, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), embeddings={"y": 3})
    else:
        net = networks.DiT(2, size=8, patch=2, width=32, depth=2, heads=2, embeddings={"y": 3})
    for p in net.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    return sf.parametrized(net.eval().requires_grad_(False), processes.Flow(), "flow", null={"y": 3})


def calibrated(d, n=24):
    return denoised(d, n, (2, 8, 8), cond={"y": torch.arange(n) % 3}, steps=5)


def call(d, x, t=0.4, y=1):
    with torch.no_grad():
        return d(x, t, Context(cond={"y": torch.full((len(x),), y)}, batch=len(x))).native


# ------------------------------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_integers_and_floats_are_the_same_work(name):
    d, x = denoiser(name), torch.randn(3, 2, 8, 8)
    cal = calibrated(d)
    simulated = quantized(d, cal, attention=False)
    counted = [operations(lambda m=m: call(m, x)) for m in (d, simulated, int8(simulated))]
    assert counted[0] == counted[1] == counted[2] > 0


@pytest.mark.parametrize(
    "base,x",
    [
        (torch.nn.Linear(24, 40), (3, 10, 24)),
        (torch.nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 7)),
        (torch.nn.Conv2d(16, 32, 1, groups=2), (2, 16, 8, 8)),
    ],
    ids=["linear", "strided", "grouped"],
)
def test_a_layer_of_integers_counts_what_its_shapes_say(base, x):
    from sfumato.acceleration.integers import Int8
    from sfumato.acceleration.quantization import Quantized
    from sfumato.acceleration.ranges import per_channel, quantizer

    layer = Quantized(base, per_channel(base.weight, 8))
    layer.input = quantizer(-3, 3, 8)
    with torch.no_grad():
        y = base(torch.randn(x))
        assert operations(lambda: Int8(layer)(torch.randn(x))) == 2 * y.numel() * base.weight[0].numel()


# --------------------------------------------------------------------------------------------------------- engines


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A denoiser, its integers by torch, and the same by onnxruntime; and its calibration."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    d = denoiser()
    cal = calibrated(d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("graphs")))
        yield d, int8(d, cal), int8(d, cal, backend="onnxruntime"), cal


def test_onnxruntime_computes_the_same_integers_for_any_batch_and_in_threads(pair):
    d, ours, theirs, cal = pair
    assert isinstance(theirs._graph[0], Session)
    for n in (1, 5):
        x = cal.x[:n]
        y = call(d, x)
        near = float((call(theirs, x) - call(ours, x)).norm() / y.norm())
        assert near < 0.02 and near < 0.8 * float((call(ours, x) - y).norm() / y.norm())
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: call(theirs, cal.x[i : i + 3])})) for i in (0, 6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(found[i], call(theirs, cal.x[i : i + 3])) for i in (0, 6))


def test_the_graph_goes_under_guidance_and_taps_see_the_network(pair):
    d, ours, theirs, cal = pair
    cond = {"y": torch.tensor([0, 1])}
    run = {"solver": "ddim", "steps": 3, "shape": (2, 2, 8, 8), "cond": cond, "seed": 1}
    with torch.no_grad():
        a, b = (sf.sample(cfg(2.0)(m), **run) for m in (ours, theirs))
        _, seen = features(theirs, cal.x[:2], 0.5, Context(cond=cond, batch=2), ["blocks.1"])
    assert float((a - b).norm() / a.norm()) < 0.05 and seen["blocks.1"].shape == (2, 16, 32)
    assert operations(lambda: call(theirs, cal.x[:2])) == operations(lambda: call(d, cal.x[:2]))


def test_a_graph_is_read_the_next_time(pair, caplog, monkeypatch):
    d, _, theirs, cal = pair
    with caplog.at_level(logging.INFO, "sfumato"):
        again = int8(d, cal, backend="onnxruntime")
    said = [r.getMessage() for r in caplog.records if r.name == "sfumato"]
    assert any("graph of 8-bit integers: made now" in line for line in said)  # another folder than the pair's
    monkeypatch.setattr(torch.onnx, "export", None)
    third = int8(d, cal, backend="onnxruntime")
    assert torch.equal(call(again, cal.x[:2]), call(third, cal.x[:2]))


def test_a_graph_is_found_again_whatever_the_order_of_the_conditions(monkeypatch):
    """The order of a set of strings is another one in each process."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = networks.DiT(2, size=8, patch=2, width=32, depth=1, heads=2, embeddings={"y": 3, "z": 2})
    d = sf.parametrized(net.eval().requires_grad_(False), processes.Flow(), "flow", null={"y": 3, "z": 2})
    told = {"y": torch.arange(8) % 3, "z": torch.arange(8) % 2}
    cal = denoised(d, 8, (2, 8, 8), cond=told, steps=2)
    first = int8(d, cal, backend="onnxruntime")
    monkeypatch.setattr(torch.onnx, "export", None)
    turned = Calibration(cal.x, cal.t, dict(reversed(cal.cond.items())))
    second = int8(d, turned, backend="onnxruntime")
    ctx = Context(cond={k: v[:4] for k, v in told.items()}, batch=4)
    assert torch.equal(first(cal.x[:4], 0.4, ctx).native, second(cal.x[:4], 0.4, ctx).native)


def test_refusals_of_engines(pair):
    d, ours, theirs, cal = pair
    unet = denoiser("unet")
    for made, said in [
        (lambda: int8(d, cal, backend="odd"), "one of onednn"),
        (lambda: int8(quantized(d, cal, attention=False), backend="onnxruntime"), "calibration set"),
        (lambda: int8(unet, calibrated(unet), backend="onnxruntime"), "convolution"),
        (lambda: call(theirs, torch.randn(2, 2, 16, 16)), "made for items"),
        (lambda: call(theirs, cal.x[:2].double()), "float32"),
        (lambda: theirs(cal.x[:2].requires_grad_(), 0.4, Context(cond={"y": torch.ones(2).long()}, batch=2)), "gradient"),
        (lambda: acceleration.get("int8(backend='odd')"), "one of onednn"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            made()
    cal.x.requires_grad_(False)


def test_torchao_is_nearer_to_the_full_network(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda net: net)  # a minute of compilation changes no number
    d = denoiser()
    cal = calibrated(d)
    call(d, cal.x[:1])
    theirs, y = int8(d, cal, backend="torchao"), call(d, cal.x[:6])
    error = [float((call(m, cal.x[:6]) - y).norm() / y.norm()) for m in (theirs, int8(d, cal))]
    assert 0 < error[0] < error[1]
    assert operations(lambda: call(theirs, cal.x[:2])) == operations(lambda: call(d, cal.x[:2]))


# ---------------------------------------------------------------------------------------------------------- keeping


def test_what_is_kept_is_made_once_and_again_where_it_is_damaged(caplog):
    made: list[int] = []

    def make():
        made.append(1)
        return b"the very bytes"

    def get():
        return kept("it", "thing", make, lambda data: data.decode())

    with caplog.at_level(logging.INFO, "sfumato"):
        assert get() == get() == "the very bytes" and len(made) == 1
        path = files.cache_folder() / "thing"
        whole = path.read_bytes()
        for broken in (b"", whole[:-1], whole[:20], whole[:40] + b"X" + whole[41:]):  # cut off, or another byte
            path.write_bytes(broken)
            assert get() == "the very bytes" and path.read_bytes() == whole
    said = " ".join(r.getMessage() for r in caplog.records)
    assert len(made) == 5 and "made now" in said and "read from" in said and "damaged" in said
    assert [p.name for p in files.cache_folder().iterdir()] == ["thing"]  # nothing half-written is left


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file"))
    assert kept("it", "thing", lambda: b"bytes", bytes) == b"bytes"
    assert "cannot be kept" in caplog.text


def test_digests_tell_names_types_shapes_and_bits():
    x = torch.arange(4.0)
    different = [digest(f, t) for f, t in [
        (["a"], {"x": x}), (["b"], {"x": x}), (["a"], {"y": x}), (["a"], {"x": x.view(2, 2)}), (["a"], {"x": x.double()}),
        (["a"], {"x": x + 1e-6}), (["a"], {"x": x, "y": x}),
    ]]  # fmt: skip
    assert len(set(different)) == len(different) and digest(["a"], {"x": x.clone()}) == different[0]


def test_a_calibration_is_read_the_next_time_and_belongs_to_model_and_settings(monkeypatch):
    pipe = sf.load("digits")
    first = pipe.calibration(6, 3, 1)
    others = [pipe.calibration(6, 3, 2), pipe.calibration(6, 2, 1)]
    changed = sf.load("digits")
    with torch.no_grad():
        next(changed.denoiser.parameters()).mul_(1.001)
    others.append(changed.calibration(6, 3, 1))
    guided = sf.load("digits")
    guided.guidance = 3.0
    others.append(guided.calibration(6, 3, 1))
    assert len(list(files.cache_folder().glob("calibration-*"))) == 5
    assert not any(torch.equal(first.x, other.x) for other in others[:1] + others[2:])
    monkeypatch.setattr(acceleration, "denoised", None)  # the model is not run again
    again = sf.load("digits").calibration(6, 3, 1)
    assert (
        torch.equal(again.x, first.x)
        and torch.equal(again.t, first.t)
        and torch.equal(again.cond["y"], first.cond["y"])
    )


def test_a_pipeline_with_objects_is_calibrated_anew():
    pipe = sf.load("digits")
    pipe.guidance = cfg(2.0)
    pipe.calibration(4, 2, 1)
    assert not files.cache_folder().exists()
