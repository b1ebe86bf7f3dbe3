"""Images a second and memory of Trainer against a plain diffusers training loop: same network, data and arithmetic.

The peer is the loop of the diffusers examples (accelerate, DataLoader, mse, clipping, AdamW, learning-rate schedule,
EMAModel, the loss read every step). ``transformer`` (a DiT of diffusers), ``diffusers`` and ``sfumato`` (U-Nets of
diffusers and of ours) are unconditional and on pixels, both loops training an epsilon network on the linear schedule of
1000 steps. ``text-to-image`` is the transformer of ``emoji-latent`` on 64-pixel drawings with their captions by flow matching,
``text-to-pixels`` the U-Net of ``emoji-pixel`` on 32-pixel ones by v-prediction: the peer decodes and encodes the pictures (of the
first) and the captions of each batch, as the example of diffusers for text-to-image does; ours reads codes and caption features
that were encoded once, as those models were trained, and what that costs is printed beside. Each loop runs in a process of its own; rounds are interleaved, one process
at a time, and the figure is the median over rounds of CPU time, which other programs hardly change (with --threads 2, of
the clock: run it alone). Peak memory is that of the process.

    python benchmarks/training_speed.py [--network transformer|diffusers|sfumato|text-to-image|text-to-pixels] [--batch 16]
        [--rounds 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import sfumato as sf
from sfumato.denoisers import Parametrized, parametrized
from sfumato.networks import SentenceEncoder, UNet
from sfumato.objectives import Denoising
from sfumato.processes import DDPM
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches, Shards, write_shards
from sfumato.training.host import fast
from sfumato.zoo import captions, emoji, make_emoji

NETWORKS = {
    "transformer": 16,
    "diffusers": 16,
    "sfumato": 16,
    "text-to-image": 64,
    "text-to-pixels": 64,
}  # name -> items a batch
LATENT = "text-to-image"
TEXT = {LATENT: 64, "text-to-pixels": 32}  # name -> pixels


class Transformer(nn.Module):
    """DiTTransformer2DModel (Peebles and Xie's DiT, 4 heads of 64, 6 layers) as net(x, label) -> tensor, label in 0 .. 999."""

    def __init__(self, size: int) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__()
        self.net = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=64, in_channels=3, out_channels=3, num_layers=6, sample_size=size,
            patch_size=2, num_embeds_ada_norm=1,
        )  # fmt: skip

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        none = torch.zeros(len(x), dtype=torch.long)
        return self.net(x, label.long().expand(len(x)), none).sample  # type: ignore[no-any-return]


class Diffusers(nn.Module):
    """UNet2DModel as net(x, label) -> tensor, label in 0 .. 999."""

    def __init__(self, size: int) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.net = UNet2DModel(
            sample_size=size, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=8,
        )  # fmt: skip

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.net(x, label).sample  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Work:
    """What a loop is to train: a network, on batches of pictures of a size; ``shards`` is where codes and features are."""

    network: str
    batch: int
    size: int = 32
    shards: str = ""


def network(work: Work) -> nn.Module:
    """The network of an unconditional training, the same for every loop."""
    torch.manual_seed(0)
    if work.network == "transformer":
        return Transformer(work.size)
    if work.network == "diffusers":
        return Diffusers(work.size)
    return UNet(3, width=32, multipliers=(1, 2, 4), attention=(False, False, True), scale=1.0)


def pictures(size: int, n: int = 512) -> Tensor:
    """Noise as uint8 (n, 3, size, size): what is in them does not matter to the time."""
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def peer(work: Work) -> Iterator[None]:
    """The diffusers loop of the unconditional example as a generator: one step a ``next``."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000)

    def loss_of(model: nn.Module, clean: Tensor) -> Tensor:
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),)).long()
        return F.mse_loss(model(scheduler.add_noise(clean, noise, t), t).float(), noise.float())

    data = torch.utils.data.TensorDataset(pictures(work.size).float() / 127.5 - 1)
    return peer_loop(network(work), data, work.batch, lambda model, items: loss_of(model, *items))


def peer_loop(model: Any, data: Any, batch: int, loss_of: Callable[[nn.Module, Any], Tensor]) -> Iterator[None]:
    """What all training examples of diffusers share, around the loss of one batch."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule: Any = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    while True:
        for items in loader:
            loss = loss_of(model, items)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            loss.detach().item()
            yield


def ours(work: Work, channels_last: bool = False) -> Iterator[None]:
    """Trainer on pixels."""
    denoiser = parametrized(network(work), DDPM("linear"), "eps", clock=lambda t: 1000 * t - 1)
    return our_loop(Denoising(denoiser), Batches(Arrays({"x": pictures(work.size)}), work.batch), channels_last)


def our_loop(objective: Denoising, batches: Any, channels_last: bool = False) -> Iterator[None]:
    """Trainer with the numbers of the peer as a generator: one step a ``next``."""
    trainer = Trainer(
        objective, batches, steps=10_000, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, warmup=500, decay="cosine",
        clip=1.0, ema=0.9999, channels_last=channels_last, cpu=True,
    )  # fmt: skip
    trainer.objective.train()
    with fast(trainer.objective, trainer.device):  # as Trainer.fit does
        while True:
            trainer._iterate()
            yield


def drawings(size: int, n: int = 512) -> tuple[Tensor, list[str]]:
    """Emoji (n, 3, size, size), uint8, and their captions."""
    items = emoji.load(size, split="train")
    return items.images[:n], items.captions[:n]


class Files(torch.utils.data.Dataset[tuple[Tensor, str, int]]):
    """:func:`drawings` as PNG files, which are decoded whenever they are read: picture in [-1, 1], caption, vendor."""

    def __init__(self, size: int) -> None:
        images, self.captions = drawings(size)
        self.files = [BytesIO() for _ in images]
        for file, image in zip(self.files, images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, str, int]:
        pixels = torch.from_numpy(np.array(Image.open(self.files[i]).convert("RGB")))
        return pixels.permute(2, 0, 1) / 127.5 - 1, self.captions[i], 0


def text_peer(work: Work) -> Iterator[None]:
    """The diffusers loop of the text-to-image example: files are decoded and the encoders run for every batch."""
    text, codec = SentenceEncoder(), load_codec() if work.network == LATENT else None

    def loss_of(model: nn.Module, items: Any) -> Tensor:
        with torch.no_grad():
            clean = items[0] if codec is None else codec.encode(items[0])
            cond = captions.conditions(*text.encode(items[1], captions.TOKENS))
        noise, t = torch.randn_like(clean), torch.rand(len(clean))
        clock = t[:, None, None, None]
        if codec is None:  # v-prediction on the cosine process
            alpha, sigma = (clock * math.pi / 2).cos(), (clock * math.pi / 2).sin()
            noisy, wanted = alpha * clean + sigma * noise, alpha * noise - sigma * clean
        else:
            noisy, wanted = torch.lerp(clean, noise, clock), noise - clean
        return F.mse_loss(model(noisy, t, **cond, vendor=items[2]).float(), wanted)

    return peer_loop(text_denoiser(work).net, Files(work.size), work.batch, loss_of)


def text_ours(work: Work) -> Iterator[None]:
    """Trainer on the shards that :func:`encode` wrote."""
    fields = ("text", "text_mask", "vector", "vendor")
    return our_loop(Denoising(text_denoiser(work)), Batches(Shards(work.shards), work.batch, cond=fields))


def text_denoiser(work: Work) -> Parametrized:
    """``emoji-latent`` or ``emoji-pixel``, untrained."""
    return make_emoji.latent_denoiser() if work.network == LATENT else make_emoji.pixel_denoiser()


def encode(work: Work, folder: str) -> float:
    """Write pictures (or their codes) and caption features of :func:`drawings` as shards; CPU seconds a picture, spent once."""
    text, codec = SentenceEncoder(), load_codec() if work.network == LATENT else None
    images, prompts = drawings(work.size)

    def transform(items: Any) -> dict[str, Tensor]:
        x = (
            {"x": items["x"]}
            if codec is None
            else dict(zip(("x", "std"), make_emoji.encoded(codec, items["x"]), strict=True))
        )
        cond = captions.conditions(*text.encode(items["prompt"], captions.TOKENS))
        return {**x, **cond, "vendor": torch.zeros(len(items["x"]), dtype=torch.long)}

    text.encode(["warm up"], captions.TOKENS)
    began = time.process_time()
    write_shards(Arrays({"x": images, "prompt": prompts}), folder, transform=transform)
    return (time.process_time() - began) / len(images)


def load_codec() -> Any:
    """The autoencoder of ``emoji-latent``."""
    return sf.load("emoji-latent").codec


LOOPS: dict[str, Callable[[Work], Iterator[None]]] = {
    "diffusers": peer,
    "sfumato": ours,
    "sfumato, channels_last": lambda work: ours(work, True),
}
TEXT_LOOPS: dict[str, Callable[[Work], Iterator[None]]] = {"diffusers": text_peer, "sfumato": text_ours}


def loops(work: Work) -> dict[str, Callable[[Work], Iterator[None]]]:
    """The loops that can train this network, the peer's first."""
    return TEXT_LOOPS if work.network in TEXT else LOOPS


def serve(pipe: Connection, loop: str, work: Work, threads: int) -> None:
    """Answers a number of steps with the seconds they took, and 0 with the peak megabytes of this process.

    CPU seconds for one thread; seconds of the clock for several, of which some only wait.
    """
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    steps = loops(work)[loop](work)
    while (n := pipe.recv()) > 0:
        began = clock()
        for _ in range(n):
            next(steps)
        pipe.send(clock() - began)
    pipe.send(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def measure(work: Work, rounds: int = 7, steps: int = 4, threads: int = 1) -> dict[str, Any]:
    """Images a second and peak memory of each loop on one network, and the ratios to the diffusers loop."""
    if work.network not in TEXT:
        return _measured(work, rounds, steps, threads)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        work = replace(work, size=TEXT[work.network], shards=folder)
        once = encode(work, folder)
        figures = _measured(work, rounds, steps, threads)
    return figures | {"encoding, CPU seconds a picture, once": round(once, 4)}


def _measured(work: Work, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """The figures of all loops, in interleaved rounds."""
    spawn = torch.multiprocessing.get_context("spawn")
    pipes, spent = {}, {loop: [] for loop in loops(work)}
    for loop in spent:
        pipes[loop], end = spawn.Pipe()
        spawn.Process(target=serve, args=(end, loop, work, threads), daemon=True).start()
    for round_ in range(rounds + 1):
        for loop, pipe in pipes.items():
            pipe.send(steps)
            seconds = pipe.recv() / steps
            if round_:  # the first warms up
                spent[loop].append(seconds)
    peaks = {}
    for loop, pipe in pipes.items():
        pipe.send(0)
        peaks[loop] = round(pipe.recv())
    ours = [loop for loop in spent if loop != "diffusers"]
    ratios = {loop: [a / b for a, b in zip(spent["diffusers"], spent[loop], strict=True)] for loop in ours}
    return {
        "network": work.network, "batch": work.batch, "size": work.size, "threads": threads,
        "images a second": {k: round(work.batch / statistics.median(v), 2) for k, v in spent.items()},
        "over diffusers": {k: round(statistics.median(v), 3) for k, v in ratios.items()},
        "range": {k: [round(min(v), 3), round(max(v), 3)] for k, v in ratios.items()},
        "peak megabytes": peaks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="transformer")
    parser.add_argument("--batch", type=int, help="items a batch (default: 64 for those with text, else 16)")
    for name, value in (("size", 32), ("rounds", 7), ("steps", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    work = Work(args.network, args.batch or NETWORKS[args.network], args.size)
    figures = measure(work, args.rounds, args.steps, args.threads)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
