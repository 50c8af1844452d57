"""The snapshot: what a job runs, kept in the run directory, so that editing the checkout changes nothing.

In: the checkout and the resolved config. Out: ``RUN/snapshots/N/`` with ``code/`` (what git tracks of the packages, and
new files that it doesn't ignore), ``config.yaml``, ``git.txt`` and ``git.diff``, ``requirements.txt`` (as pip freeze).
A snapshot never changes: a queued job may be waiting for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from diffcap_dist.config import Config, save_config

PACKAGES = ("diffcap_dist", "launch", "shards")


def take(root: Path, config: Config, snapshots: Path) -> Path:
    """A new snapshot; the newest one where nothing has changed since."""
    snapshots.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(path.name) for path in snapshots.iterdir() if path.name.isdecimal())
    aside = snapshots / ".aside"
    shutil.rmtree(aside, ignore_errors=True)
    for name in _files(root):
        target = aside / "code" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target)
    save_config(config, aside / "config.yaml")
    (aside / "git.txt").write_text(describe(root) + "\n", encoding="utf-8")
    (aside / "git.diff").write_text(_git(root, "diff", "HEAD") or "", encoding="utf-8")
    (aside / "requirements.txt").write_text("\n".join(_installed()) + "\n", encoding="utf-8")
    if numbers and _digest(snapshots / str(numbers[-1])) == _digest(aside):
        shutil.rmtree(aside)
        return snapshots / str(numbers[-1])
    final = snapshots / str(numbers[-1] + 1 if numbers else 1)
    aside.rename(final)
    return final


def newest(snapshots: Path) -> Path | None:
    """The snapshot that was taken last."""
    numbers = [int(path.name) for path in snapshots.glob("*") if path.name.isdecimal()]
    return snapshots / str(max(numbers)) if numbers else None


def describe(root: Path) -> str:
    """The commit, and whether the checkout differs from it."""
    commit = (_git(root, "rev-parse", "HEAD") or "").strip()
    if not commit:
        return "no git checkout"
    changed = (_git(root, "status", "--porcelain") or "").splitlines()
    return commit + (f" and changes in {len(changed)} files (git.diff)" if changed else "")


def _files(root: Path) -> list[str]:
    """Of the packages: what git tracks or would; without git every file that is not made by running."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PACKAGES)
    if listed:
        names = [name for name in listed.split("\0") if name]
    else:
        paths = [path for package in PACKAGES for path in (root / package).rglob("*")]
        names = [str(path.relative_to(root)) for path in paths if "__pycache__" not in path.parts]
    return sorted(name for name in set(names) if (root / name).is_file())


def _installed() -> list[str]:
    """The lines of `pip freeze --all`, where there is no pip too. A checkout that is installed as editable is its path:
    its commit is in git.txt."""
    found: dict[str, str] = {}
    # setuptools, once imported, puts its own copies of packages on the path; they are not installed.
    places = [place for place in sys.path if Path(place).name != "_vendor"]
    for one in importlib.metadata.distributions(path=places):
        name, line = one.metadata["Name"], _pinned(one)
        if name and (name not in found or "==" not in line):  # a checkout's egg-info lies beside its installation
            found[name] = line
    return sorted(found.values(), key=str.lower)


def _pinned(package: importlib.metadata.Distribution) -> str:
    """Its version, or where it came from (PEP 610)."""
    name, source = package.metadata["Name"], json.loads(package.read_text("direct_url.json") or "{}")
    if not source:
        return f"{name}=={package.version}"
    url = source["url"] + (f"#subdirectory={source['subdirectory']}" if "subdirectory" in source else "")
    if source.get("dir_info", {}).get("editable"):
        return f"-e {urllib.request.url2pathname(url.removeprefix('file://'))}"
    vcs = source.get("vcs_info")
    return f"{name} @ {vcs['vcs']}+{source['url']}@{vcs['commit_id']}" if vcs else f"{name} @ {url}"


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    digest = hashlib.sha256()
    for path in files:
        if path.suffix != ".sbatch":
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
