"""Kill a training with SIGKILL at ten random moments and compare it with one that was left alone.

A U-Net on pictures from an image folder, with dropout of the condition, two averages, profiles and metrics. Every tensor of
the last checkpoint and every line of metrics.jsonl (but the clock) must be equal bit for bit.

    python benchmarks/kill_resume.py [--kills 10] [--steps 300] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from sfumato.denoisers import parametrized
from sfumato.networks import UNet
from sfumato.objectives import ByLoss, Denoising
from sfumato.processes import VP
from sfumato.training import Trainer
from sfumato.training.data import Batches, ImageFolder


def pictures(folder: Path) -> None:
    """Two classes of 40 small pictures."""
    draw = random.Random(0)
    for kind in ("dark", "light"):
        (folder / kind).mkdir(parents=True)
        for i in range(40):
            low, high = (0, 120) if kind == "dark" else (130, 255)
            Image.new("RGB", (12, 12), tuple(draw.randint(low, high) for _ in range(3))).save(
                folder / kind / f"{i}.png"
            )


def train(data: Path, out: Path, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = UNet(3, width=16, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2, embeddings={"y": 2})
    objective = Denoising(parametrized(net, VP(), "v", null={"y": 2}), times=ByLoss(16), weighting="min-snr")
    batches = Batches(ImageFolder(data, 8), 8, cond={"label": "y"}, flip=True)
    Trainer(
        objective, batches, steps=steps, out=out, lr=1e-3, warmup=20, decay="cosine", clip=1.0, save_every=5, log_every=7,
        profiles=(0.05, 0.1), snapshot_every=50, channels_last=True, cpu=True,
    ).fit()  # fmt: skip


def history(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def lines(out: Path) -> int:
    """How far a training has come, by its metrics."""
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(*args.train, args.steps)
        return 0
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data, whole, killed = (Path(folder) / name for name in ("data", "whole", "killed"))
        pictures(data)
        command = [sys.executable, __file__, "--steps", str(args.steps), "--train", str(data)]
        subprocess.run([*command, str(whole)], check=True)
        for kill in range(args.kills):
            process = subprocess.Popen([*command, str(killed)])
            aim = lines(killed) + moments.randint(1, 3)
            while lines(killed) < aim and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.3))
            if process.poll() is not None:
                return process.returncode or sys.exit("it got through before it was killed often enough: raise --steps")
            process.kill()
            process.wait()
            print(f"killed {kill + 1}: {lines(killed)} lines of metrics")
        subprocess.run([*command, str(killed)], check=True)
        a, b = (load_file(out / "checkpoint.safetensors") for out in (whole, killed))
        tensors = set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
        metrics = history(whole) == history(killed)
        result = {
            "kills": args.kills,
            "tensors": len(a),
            "tensors equal": tensors,
            "metrics equal": metrics,
            "steps": args.steps,
        }
        print(json.dumps(result))
        return 0 if tensors and metrics else 1


if __name__ == "__main__":
    sys.exit(main())
