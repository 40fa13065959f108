"""Configuration of the experiment on images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from curvfast.demo.caching import key_of


@dataclass(frozen=True)
class Statistics:
    """The data that curvature is measured on: images, tokens and labels."""

    images: str = "fresh"
    """``"fresh"`` images, never trained on, or the ``"training"`` ones."""
    tokens: str = "all"
    """``"all"`` tokens of an image, or ``"cls"`` only, as in the paper."""
    labels: str = "sampled"
    """``"sampled"`` from the model (the true Fisher), or ``"given"`` (the empirical one)."""

    def __str__(self) -> str:
        """Return the three words."""
        return f"{self.images}, {self.tokens}, {self.labels}"


STATISTICS = (
    Statistics(),
    Statistics(tokens="cls"),
    Statistics(images="training"),
    Statistics(images="training", tokens="cls"),
    Statistics(labels="given"),
    Statistics(images="training", labels="given"),
    Statistics(images="training", tokens="cls", labels="given"),
)

# Fields that training does not depend on.
_LATER = (
    "mass", "sweep", "study", "blocks", "statistics", "fresh_images", "validation_images"
)  # fmt: skip


@dataclass(frozen=True)
class VitRecipe:
    """Data, sizes, schedule and seed of a vision transformer, and its edits."""

    data: str
    """``"mnist"`` or ``"fashion"``."""
    train_images: int
    fresh_images: int
    validation_images: int
    noise: float
    """Share of training pictures with a wrong label."""
    epochs: int
    weight_decay: float
    mass: float
    """ρ of the edit that is reported."""
    sweep: tuple[float, ...]
    study: tuple[float, ...]
    """Further ρ at which statistics and blocks are compared."""
    seed: int = 0
    blocks: tuple[int, ...] | None = None
    """Blocks whose fc1 and fc2 are edited; None means all."""
    hidden: int = 64
    mlp: int = 256
    layers: int = 4
    heads: int = 4
    patch: int = 7
    batch: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    statistics: tuple[Statistics, ...] = STATISTICS
    """Statistics that are compared; the first are those of the edit."""

    def quick(self) -> VitRecipe:
        """Return a recipe of seconds, which runs every step but gives no meaningful results."""
        return replace(
            self, train_images=200, fresh_images=100, validation_images=100, hidden=16, mlp=32,
            layers=2, heads=2, patch=14, epochs=2, sweep=(0.8, 0.95), study=(0.8,),
        )  # fmt: skip

    def training_key(self) -> str:
        """Return a name for the trained model: a hash of what its training depends on."""
        facts = asdict(self)
        for later in _LATER:
            del facts[later]
        return key_of(facts)


_SWEEP = (0.75, 0.85, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995)
_STUDY = (0.9, 0.97)
# 700 fresh digits are too few for factors of width 256: training images are used.
_MNIST = VitRecipe(
    "mnist", 3600, 700, 700, noise=0.2, epochs=40, weight_decay=1.0, mass=0.985, sweep=_SWEEP,
    study=_STUDY, statistics=(STATISTICS[2], *STATISTICS[:2], *STATISTICS[3:]),
)  # fmt: skip
_FASHION = VitRecipe(
    "fashion", 4000, 4000, 2000, noise=0.2, epochs=40, weight_decay=0.3, mass=0.95, sweep=_SWEEP,
    study=_STUDY,
)  # fmt: skip
RECIPES: Mapping[str, VitRecipe] = {
    "mnist": _MNIST,
    "fashion": _FASHION,
    # Trained to zero loss: on its training images its curvature is that of the noise.
    "overfit": replace(_FASHION, noise=0.1, epochs=60, mass=0.9),
}
