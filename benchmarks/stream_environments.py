"""Virtual environments of the peers whose pins conflict with ours, made once and reused.

In: a folder. Out: for each such peer the path of its Python, or why there is none. Torch, torchvision and Pillow are of
the versions that run here, so that all decode with the same code.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PEERS = {"mosaicml": "mosaicml-streaming==0.13.0", "litdata": "litdata==0.2.76"}
SHARED = ("torch", "torchvision", "pillow")
INSTALLED_FILE = "installed.txt"  # what pip was asked for, written when it has succeeded


@dataclass(frozen=True)
class NotInstalled:
    reason: str


def environment_of(peer: str, folder: Path) -> Path | NotInstalled:
    """The Python of ``peer``'s environment below ``folder``; made there where it is missing (minutes, 6 GB)."""
    wanted = [PEERS[peer], *(f"{name}=={version(name).split('+')[0]}" for name in SHARED)]
    home = folder.resolve() / peer
    python, installed = home / "bin" / "python", home / INSTALLED_FILE
    if installed.is_file() and installed.read_text().split() == wanted:
        return python
    print(f"making the environment of {PEERS[peer]} in {home} ...", file=sys.stderr)
    for command in ([sys.executable, "-m", "venv", home], [python, "-m", "pip", "install", "--quiet", *wanted]):
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            return NotInstalled(f"{PEERS[peer]} could not be installed: {_said(run.stderr or run.stdout)}")
    installed.write_text("\n".join(wanted) + "\n")
    return python


def _said(output: str) -> str:
    """pip's first error, or else the last line."""
    lines = output.strip().splitlines() or ["no message"]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1])
