"""evaluate: streams, registered metrics, texts, pairs, and several processes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.core.errors import InputError, SfumatoError, UnknownName
from sfumato.evaluation import (
    METRICS,
    Measurement,
    NetworkFeatures,
    PCAFeatures,
    PixelFeatures,
    batches,
    evaluate,
    evaluate_pairs,
    extract,
    metrics,
)


def pictures(n: int, seed: int = 0, size: int = 6, bright: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(bright, 200 + bright, (n, 3, size, size), generator=generator).to(torch.uint8)


def small_network() -> NetworkFeatures:
    """A convolutional extractor in float32: its round-off depends on how images are put into batches."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6)
    )
    return NetworkFeatures(net.eval(), "small network")


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), size=st.integers(1, 12))
def test_batches_are_recut_without_loss_or_change_of_order(cuts: list[int], size: int) -> None:
    images = pictures(sum(cuts))
    found = list(batches(iter(images.split(cuts)), size))
    assert torch.equal(torch.cat(found), images)
    assert [len(b) for b in found[:-1]] == [size] * (len(found) - 1) and 1 <= len(found[-1]) <= size
    assert [len(b) for b in batches(images, size)] == [len(b) for b in found]


def test_pictures_of_several_sizes_come_in_their_own_batches() -> None:
    found = list(batches([pictures(3), pictures(4, size=8), pictures(2, size=8)], 5))
    assert [tuple(b.shape) for b in found] == [(3, 3, 6, 6), (5, 3, 8, 8), (1, 3, 8, 8)]


def test_the_form_of_the_images_does_not_matter(tmp_path: Path) -> None:
    """One tensor, a generator of shards, a memory map on disk and ready-made features give one table."""
    samples, reference = pictures(90), pictures(70, 1, bright=20)
    extractor = small_network()
    names = ("frechet", "kernel", "rbf", "precision-recall", "density-coverage", "sliced-wasserstein", "two-sample")

    def table(a, b):
        return evaluate(a, b, features=extractor, metrics=names, batch=16, seed=3, reference_name="held out")

    whole = table(samples, reference)
    assert table(iter(samples.split(7)), list(reference.split(33))) == whole
    np.save(tmp_path / "shard.npy", samples.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "shard.npy", mmap_mode="c"))
    assert table(mapped, reference) == whole
    features = [extract(images, extractor, batch=16) for images in (samples, reference)]
    assert table(*features) == whole
    assert whole["frechet distance"] == metrics.frechet_distance(*features, seed=3).labelled(
        features="small network", reference="held out"
    )
    assert whole["recall"].value == metrics.precision_recall(*features)[1].value
    assert [row["name"] for row in whole] == [
        "frechet distance", "kernel distance", "rbf distance", "precision", "recall", "density", "coverage",
        "sliced wasserstein distance", "classifier two-sample accuracy",
    ]  # fmt: skip
    assert json.loads(whole.json())["rows"][0]["features"] == "small network"


def test_every_registered_metric_runs_and_tells_a_shift_from_none() -> None:
    """Each figure is better (if a direction is declared) for samples of the reference's law than for shifted ones."""

    class Dual(PCAFeatures):
        def encode_text(self, texts):
            return torch.eye(4, dtype=torch.float64)[: len(texts)]

    training = pictures(150, 2)
    extractor = Dual(training, 4)
    rest = {
        "features": extractor,
        "metrics": METRICS.names(),
        "training": training,
        "prompts": ["a", "b", "c", "d"] * 20,
    }
    good = evaluate(pictures(80), pictures(100, 1), **rest)
    shifted = evaluate(pictures(80, bright=50), pictures(100, 1), **rest)
    skipped = ("memorisation", "text agreement", "retrieval")
    for a, b in zip(good, shifted, strict=True):
        better = a["higher_is_better"]
        if better is not None and not any(word in a["name"] for word in skipped):
            assert (a["value"] > b["value"]) == better, a["name"]
    assert evaluate(training[:80], pictures(100, 1), **rest)["memorisation rate"].value == 1
    assert evaluate(training[:80], pictures(100, 1), **rest)["memorisation ratio"].value == 1


def test_a_metric_of_ones_own() -> None:
    def spread(sets) -> Measurement:
        return Measurement.mean("spread", (sets.samples - sets.samples.mean(0)).norm(dim=1), higher_is_better=True)

    table = evaluate(pictures(30), pictures(30, 1), features="pixels", metrics=[spread, "precision-recall"])
    x = pictures(30).flatten(1).float() / 255
    assert table["spread"].value == pytest.approx((x - x.mean(0)).norm(dim=1).mean().item(), rel=1e-5)
    assert table["spread"].features == "pixels"
    with pytest.raises(InputError, match="returns a Measurement"):
        evaluate(pictures(30), pictures(30, 1), features="pixels", metrics=[lambda sets: 3.0])


class Colours:
    """A dual encoder of mean colours; its words are colours."""

    name = "mean colour"
    words = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (1, 1, 1)}

    def __call__(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3))

    def encode_text(self, texts) -> Tensor:
        return torch.tensor([self.words[text] for text in texts]).double()


def test_texts_are_matched_with_their_samples() -> None:
    prompts = ["red", "blue", "green", "blue"]
    images = (
        (torch.tensor([Colours.words[p] for p in prompts])[:, :, None, None] * 200).to(torch.uint8).expand(-1, -1, 4, 4)
    )
    rest = {"features": Colours(), "metrics": ["text-agreement"]}
    found = evaluate(images, images, prompts=prompts, **rest)
    assert found["text agreement"].value == pytest.approx(1) and found["top-1 retrieval"].value == 1
    assert [row["name"] for row in found] == ["text agreement", "top-1 retrieval"] and found.rows[1]["reference_n"] == 3
    wrong = evaluate(images, images, prompts=["green", "blue", "green", "red"], concepts=list(Colours.words), **rest)
    assert wrong["text agreement"].value == pytest.approx(0.5) and wrong["top-1 retrieval"].value == 0.5
    for more, words in (
        ({"prompts": ["red"]}, "each of the 4 samples"),
        ({"prompts": prompts, "concepts": ["red", "green"]}, "'blue'"),
        ({}, "needs prompts"),
        ({"prompts": prompts, "features": PixelFeatures()}, "encode_text"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(images, images, **{**rest, **more})


def test_refusals_come_before_the_work_and_say_what_to_do() -> None:
    good = pictures(20)

    class Never:
        name = "never"

        def __call__(self, images: Tensor) -> Tensor:
            raise AssertionError("features were extracted before the arguments were checked")

    for more, error, words in (
        ({"metrics": ["memorisation"]}, InputError, "needs training"),
        ({"metrics": ["frechett"]}, UnknownName, "did you mean 'frechet'"),
        ({"metrics": []}, InputError, "frechet"),
        ({"metrics": "frechet"}, InputError, "sequence"),
        ({"features": lambda x: x}, InputError, "NetworkFeatures"),
        ({"features": "inception"}, UnknownName, "mobilenet-v2"),
        ({"batch": 0}, InputError, "batch = 0"),
        ({"distributed": True}, InputError, "accelerate launch"),
    ):
        with pytest.raises(error, match=words):
            evaluate(good, good, **{"features": Never(), **more})
    for samples, words in (
        ([], "samples hold no images"),
        (good[:0], "samples hold no images"),
        (good / 255, "uint8 in 0..255"),
        ([(good, 1)], "samples: images"),
        ("folder/of/pictures", "iterable"),
        (3, "iterable"),
        ([good, good[0]], "B, C, H, W"),
        ([good, pictures(4, size=8)], "different widths"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(samples, good, features="pixels", metrics=["kernel"])
    with pytest.raises(InputError, match="wide: features"):
        evaluate(good, good, features=type("Wide", (), {"name": "wide", "__call__": lambda self, x: x})())


def test_pairs_are_measured_in_step() -> None:
    truth = pictures(50, size=16)
    images = (truth.int() + torch.randint(0, 9, truth.shape, generator=torch.Generator().manual_seed(1))).to(
        torch.uint8
    )
    found = evaluate_pairs(iter(images.split(7)), truth, batch=16)
    for name, figure in (("PSNR", metrics.psnr), ("SSIM", metrics.ssim)):
        assert found[name].value == pytest.approx(figure(images, truth).value, rel=1e-12) and found[name].n == 50
    with pytest.raises(InputError, match="shape"):
        evaluate_pairs(images, truth[:49])
    with pytest.raises(InputError, match="pair up"):
        evaluate_pairs(images, truth[:32], batch=16)
    with pytest.raises(InputError, match="psnr, ssim"):
        evaluate_pairs(images, truth, metrics=["lpips"])


def shared_work(extractor) -> list[dict]:
    names = ("frechet", "kernel", "precision-recall", "density-coverage")
    return list(evaluate(pictures(90), iter(pictures(75, 1).split(9)), features=extractor, metrics=names, batch=16))


class FailsOnce:
    """Fails on the batch that the second process computes."""

    name = "fails once"

    def __call__(self, images: Tensor) -> Tensor:
        if torch.equal(images[0], pictures(90)[16]):
            raise ZeroDivisionError("one batch is bad")
        return images.flatten(1)[:, :4].float()


def one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    seen = small_network()
    calls: list[int] = []
    net = seen.net
    net.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    report = {"rows": shared_work(seen), "images": sum(calls)}
    try:
        shared_work(FailsOnce())
    except Exception as error:
        report["error"] = [type(error).__name__, str(error)]
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_table_of_one_and_fail_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = shared_work(small_network())
    torch.set_num_threads(threads)
    # 165 images in batches of 16: 6 + 5 batches, of which the first process has the even ones.
    assert [report["images"] for report in reports] == [16 * 3 + 16 * 2 + 11, 16 * 2 + 10 + 16 * 2]
    for report in reports:
        for ours, exact in zip(report["rows"], alone, strict=True):
            assert ours["name"] == exact["name"]
            for key in ("value", "low", "high"):
                assert float(ours[key]) == pytest.approx(float(exact[key]), rel=1e-9, abs=1e-12)
    assert reports[1]["error"] == ["ZeroDivisionError", "one batch is bad"]
    assert reports[0]["error"] == [SfumatoError.__name__, "process 1 of 2 failed: ZeroDivisionError: one batch is bad"]
