"""Images a second and memory of Trainer against a plain diffusers training loop: same network, data and arithmetic.

The peer is the loop of the diffusers example for unconditional images (accelerate, DataLoader, add_noise, mse, clipping,
AdamW, learning-rate schedule, EMAModel, the loss read every step). Both train an epsilon network on the linear schedule of
1000 steps. Each loop runs in a process of its own; rounds are interleaved, one process at a time, and the figure is the
median over rounds of CPU time, which other programs hardly change. Peak memory is that of the process.

    python benchmarks/training_speed.py [--network diffusers|sfumato] [--batch 16] [--size 32] [--rounds 7] [--steps 4]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.denoisers import parametrized
from sfumato.networks import UNet
from sfumato.objectives import Denoising
from sfumato.processes import DDPM
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches
from sfumato.training.host import keep_freed_memory


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


def network(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "diffusers":
        return Diffusers(size)
    return UNet(3, width=32, multipliers=(1, 2, 4), attention=(False, False, True), scale=1.0)


def pictures(size: int, n: int = 512) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def peer(name: str, batch: int, size: int) -> Iterator[None]:
    """The diffusers loop as a generator: one step a ``next``."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator, scheduler = Accelerator(cpu=True), DDPMScheduler(1000)
    model: Any = network(name, size)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule: Any = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    data = torch.utils.data.TensorDataset(pictures(size).float() / 127.5 - 1)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    while True:
        for (clean,) in loader:
            noise = torch.randn_like(clean)
            t = torch.randint(0, 1000, (len(clean),)).long()
            noisy = scheduler.add_noise(clean, noise, t)
            loss = F.mse_loss(model(noisy, t).float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            loss.detach().item()
            yield


def ours(name: str, batch: int, size: int, channels_last: bool) -> Iterator[None]:
    """Trainer as a generator: one step a ``next``."""
    keep_freed_memory()  # as Trainer.fit does
    denoiser = parametrized(network(name, size), DDPM("linear"), "eps", clock=lambda t: 1000 * t - 1)
    trainer = Trainer(
        Denoising(denoiser), Batches(Arrays({"x": pictures(size)}), batch), steps=10_000, lr=1e-4, betas=(0.95, 0.999),
        weight_decay=1e-6, warmup=500, decay="cosine", clip=1.0, ema=0.9999, channels_last=channels_last, cpu=True,
    )  # fmt: skip
    trainer.objective.train()
    while True:
        trainer._iterate()
        yield


LOOPS = {
    "diffusers": peer,
    "sfumato": lambda *a: ours(*a, False),
    "sfumato, channels_last": lambda *a: ours(*a, True),
}


def work(pipe: Connection, loop: str, name: str, batch: int, size: int, threads: int) -> None:
    """Answers a number of steps with the CPU seconds they took, and 0 with the peak megabytes of this process."""
    torch.set_num_threads(threads)
    steps = LOOPS[loop](name, batch, size)
    while (n := pipe.recv()) > 0:
        began = time.process_time()
        for _ in range(n):
            next(steps)
        pipe.send(time.process_time() - began)
    pipe.send(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def measure(
    name: str = "diffusers", batch: int = 16, size: int = 32, rounds: int = 7, steps: int = 4, threads: int = 1
) -> dict[str, Any]:
    """Images a CPU second and peak memory of each loop on one network, and the ratios to the diffusers loop."""
    spawn = torch.multiprocessing.get_context("spawn")
    pipes, spent = {}, {loop: [] for loop in LOOPS}
    for loop in LOOPS:
        pipes[loop], end = spawn.Pipe()
        spawn.Process(target=work, args=(end, loop, name, batch, size, threads), daemon=True).start()
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
    ours = [loop for loop in LOOPS if loop != "diffusers"]
    ratios = {loop: [a / b for a, b in zip(spent["diffusers"], spent[loop], strict=True)] for loop in ours}
    return {
        "network": name, "batch": batch, "size": size, "threads": threads,
        "images a CPU second": {k: round(batch / statistics.median(v), 2) for k, v in spent.items()},
        "over diffusers": {k: round(statistics.median(v), 3) for k, v in ratios.items()},
        "range": {k: [round(min(v), 3), round(max(v), 3)] for k, v in ratios.items()},
        "peak megabytes": peaks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("diffusers", "sfumato"), default="diffusers")
    for name, value in (("batch", 16), ("size", 32), ("rounds", 7), ("steps", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    figures = measure(args.network, args.batch, args.size, args.rounds, args.steps, args.threads)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
