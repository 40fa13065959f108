"""Everything that decides the demo's outcome, in one record that names its cache."""

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
    """How much of the Bible passages are taken from."""
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
        """Return the recipe cut to seconds: it runs every step and proves nothing."""
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
