"""Getting files out of package registries, checked and whole: npm, and the tools that apt and pip bring."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sfumato.core.errors import InputError, SfumatoError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well and vanishes when it does not. InputError if
    ``path`` has files."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is there already: choose another folder, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=path.name + "."))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(
                f"{path} appeared while it was being made ({error.strerror}): use that one, or choose another folder"
            ) from error
    except BaseException:
        shutil.rmtree(temporary)
        raise


def check(path: Path, sha256: str) -> Path:
    """``path`` if its content has this SHA-256, else InputError."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(
            f"{path} has SHA-256 {found}, expected {sha256}: it is damaged or another version; delete it and run again"
        )
    return path


def run(command: list[str], folder: Path, need: str) -> None:
    """Run a packaging tool in ``folder``; a failure is one clear error with the tool's last words."""
    if shutil.which(command[0]) is None:
        raise SfumatoError(f"'{command[0]}' is not on this machine: {need}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        told = [line for line in lines if re.match(r"E:|error|npm (err|error)", line, re.IGNORECASE)] or lines
        said = " ".join(told[-3:])[-400:]
        raise SfumatoError(
            f"'{' '.join(command)}' failed with status {done.returncode}; it needs a package index that can be reached: {said}"
        )


def npm_package(name: str, version: str, cache: Path, sha256: str) -> Path:
    """The tarball of one npm package in ``cache``, fetched with ``npm pack`` if absent; no code of the package is
    run."""
    path = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            run(
                ["npm", "pack", f"{name}@{version}", "--silent", "--ignore-scripts"],
                Path(folder),
                "install Node.js, which brings npm",
            )
            os.replace(check(Path(folder) / path.name, sha256), path)
    return check(path, sha256)
