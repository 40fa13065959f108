"""Pictures and prose of our own for the lab and its studies: nothing is fetched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from curvfast.demo import corpus as texts
from curvfast.demo.texts import Document
from curvfast.lab import vit
from curvfast.lab.images import CLASSES, SIDE, Images

_WORDS = "the people of this nation shall hold peace and just laws in honour for all years".split()


def pictures() -> tuple[Images, Images]:
    """Noise, its class written into its first ten pixels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % CLASSES
    pixels = torch.rand(400, 1, SIDE, SIDE, generator=generator) / 4
    pixels.view(400, -1)[torch.arange(400), labels] = 9.0
    images = Images(pixels, labels)
    return images, images.take(torch.arange(0))


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(_WORDS, k=words)) + "."


def install(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Put them in place of what would be fetched, and use a cache of our own."""
    monkeypatch.setenv("CURVFAST_CACHE", str(cache))
    monkeypatch.setattr(vit, "mnist", pictures)
    monkeypatch.setattr(vit, "fashion", lambda folder: pictures())
    speeches = [Document(str(i), prose(i, 900)) for i in range(40)]
    monkeypatch.setattr(texts, "speeches", lambda: speeches)
    monkeypatch.setattr(texts, "bible", lambda: prose(99, 2000))
