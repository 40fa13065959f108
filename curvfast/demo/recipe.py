"""Recipe: the configuration of the demo, whose hash is the cache key of its model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from curvfast.demo.caching import key_of

SWEEP = (0.6, 0.7, 0.8, 0.9, 0.93, 0.94, 0.95, 0.97, 0.98, 0.99)


@dataclass(frozen=True)
class Recipe:
    """Sizes, schedule and seed of the demo's language model and of its edit."""

    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 128
    mlp: int = 384
    layers: int = 4
    heads: int = 4
    length: int = 128
    passages: int = 64
    """Passages to recite, half of speeches and half of the Bible."""
    prefix: int = 32
    suffix: int = 24
    bible_characters: int = 1_000_000
    """Extent of the Bible that passages are taken from."""
    held_out_windows: int = 240
    steps: int = 450
    prose_rows: int = 20
    """Rows of prose in a batch."""
    canary_rows: int = 12
    """Rows of two passages each in a batch."""
    learning_rate: float = 3e-3
    statistics_tokens: int = 60_000
    mass: float = 0.95
    """ρ of the edit that is reported and saved."""
    sweep: tuple[float, ...] = SWEEP

    def quick(self) -> Recipe:
        """Return a recipe of seconds, which runs every step but gives no meaningful results."""
        return replace(
            self, vocabulary=400, hidden=32, mlp=64, layers=2, heads=2, passages=8, steps=6,
            prose_rows=4, canary_rows=4, held_out_windows=8, statistics_tokens=1500,
            bible_characters=50_000, sweep=(0.8, 0.95),
        )  # fmt: skip

    def training_key(self) -> str:
        """Return a name for the trained model: a hash of what its training depends on."""
        facts = asdict(self)
        for later in ("statistics_tokens", "mass", "sweep", "held_out_windows"):
            del facts[later]
        return key_of(facts)
