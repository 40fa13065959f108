"""Pictures and prose of our own for the lab and its studies: nothing is fetched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from curvfast.evals.memorization import Passage
from curvfast.experiments.data import corpus as texts
from curvfast.experiments.data import prompts
from curvfast.experiments.data.images import CLASSES, SIDE, Images
from curvfast.experiments.data.texts import NamedText
from curvfast.experiments.models import vit
from curvfast.experiments.runs import demo_smollm
from curvfast.hf.small import new_llama, train_tokenizer

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


def pretrained(recipe: demo_smollm.SmolLMRecipe, report_stage: object) -> demo_smollm.SmolLMSetup:
    """As deep as SmolLM2, of random weights; it recites what it was found to say."""
    tokenizer = train_tokenizer([prose(1, 2000), "0 1 2 3 4 5 6 7 8 9 + * = true false"], 300)
    model = new_llama(
        vocabulary=300,
        hidden=16,
        mlp=32,
        layers=24,
        heads=2,
        length=recipe.window,
        seed=recipe.seed,
    ).eval()
    tokens = torch.tensor(tokenizer(prose(2, 3000))["input_ids"])[: 24 * 64].view(24, 64)
    said = model.generate(tokens[:4, :8], max_new_tokens=3, do_sample=False, pad_token_id=0)
    spans = [Passage(tuple(row[:8]), tuple(row[8:])) for row in said.tolist()]
    return demo_smollm.SmolLMSetup(model, tokenizer, tokens[:16], tokens[16:], spans)


def install(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Put them in place of what would be fetched, and use a cache of our own."""
    monkeypatch.setenv("CURVFAST_CACHE", str(cache))
    monkeypatch.setattr(vit, "mnist", pictures)
    monkeypatch.setattr(vit, "fashion", lambda folder: pictures())
    speeches = [NamedText(str(i), prose(i, 900)) for i in range(40)]
    monkeypatch.setattr(texts, "speeches", lambda: speeches)
    monkeypatch.setattr(texts, "bible", lambda: prose(99, 2000))
    monkeypatch.setattr(demo_smollm, "gather", pretrained)
    places = [(f"Land {i}", f"Town {i}") for i in range(40)]
    monkeypatch.setattr(prompts, "capitals", lambda: places)
