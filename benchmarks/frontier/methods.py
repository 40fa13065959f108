"""The compared methods of forgetting by name, with their strengths, weak to strong.

A new one is one entry in :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curvfast import edit, select
from curvfast.baselines import (
    NPO,
    BalancedSubnet,
    Baseline,
    Durable,
    GradientAscent,
    Greedy,
    Subnet,
)
from curvfast.kfac.importance import Importance
from curvfast.kfac.selection.kept_pairs import Selection
from frontier.settings import Setting

Change = Callable[[Setting, float], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A method of forgetting at several strengths."""

    name: str
    label: str
    change: Change
    """Changes a setting's model, in place, at one strength; returns facts to keep, JSON-able."""
    strengths: tuple[float, ...]
    """Weak to strong."""
    needs: tuple[str, ...] = ()
    """Preparations of the setting that are part of its cost."""
    supervised: bool = False
    """Whether it is given passages."""


def edit_by(importance: Importance) -> Change:
    """Edit by an importance, of which as many pairs are kept as K-FAC keeps at ρ, the strength."""

    def change(setting: Setting, mass: float) -> dict[str, Any]:
        kept = setting.basis.keep(mass=mass)
        facts = {"mass": mass, "kept_fraction": _share(setting, kept)}
        if importance == "kfac":
            edit(setting.model, setting.basis, selection=kept)
            return facts
        singular = importance == "svd"
        basis = setting.singular if singular else setting.basis
        rule = {"fraction": kept.fractions} if singular else {"pairs": kept.pairs}
        corrections = setting.corrections if importance in ("ekfac", "ekfac_saliency") else None
        chosen = select(
            setting.model, basis, importance, corrections=corrections, seed=setting.seed, **rule
        )
        edit(setting.model, basis, selection=chosen)
        return facts

    return change


def edit_opposite(setting: Setting, mass: float) -> dict[str, Any]:
    """Remove the pairs of highest curvature up to a mass, and keep the others."""
    kept = setting.basis.keep(mass=mass).complement()
    edit(setting.model, setting.basis, selection=kept)
    return {"mass": mass, "kept_fraction": _share(setting, kept)}


def _share(setting: Setting, kept: Selection) -> float:
    total = sum(len(own.values_a) * len(own.values_g) for own in setting.basis.values())
    return sum(kept.pairs.values()) / total


def forget_by(make: Callable[[float], Baseline]) -> Change:
    """Change the model by a baseline on the seen half; ``make`` creates it for a strength."""

    def change(setting: Setting, strength: float) -> dict[str, Any]:
        report = make(strength).forget(
            setting.model, setting.seen, setting.clean, setting.layers, seed=setting.seed,
            progress=False,
        )  # fmt: skip
        facts = report.to_dict()
        return {key: facts[key] for key in ("method", "settings", "changed", "zeroed")}

    return change


# Λ is measured in the eigenbasis, so it needs that too.
_CORRECTED = ("basis", "corrections")
_MASSES = (0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85)

_TRAINED = (
    Method("kfac", "**K-FAC**, λμ", edit_by("kfac"), _MASSES, ("basis",)),
    Method("ekfac", "EK-FAC, Λ", edit_by("ekfac"), _MASSES, _CORRECTED),
    Method("kfac-saliency", "λμC²", edit_by("kfac_saliency"), _MASSES, ("basis",)),
    Method("ekfac-saliency", "ΛC²", edit_by("ekfac_saliency"), _MASSES, _CORRECTED),
    Method("g-only", "λ alone", edit_by("g_only"), _MASSES, ("basis",)),
    Method("a-only", "μ alone", edit_by("a_only"), _MASSES, ("basis",)),
    Method("identity", "W², no rotation", edit_by("identity"), _MASSES),
    Method(
        "identity-saliency", "GᵢᵢAⱼⱼW², no rotation", edit_by("identity_saliency"), _MASSES,
        ("basis",),
    ),
    Method(
        "svd", "truncated SVD", edit_by("svd"), (0.998, 0.995, 0.99, 0.98, 0.97, 0.95),
        ("singular",),
    ),
    Method(
        "random", "random pairs", edit_by("random"), (0.999999, 0.99999, 0.9999, 0.999, 0.99),
        ("basis",),
    ),
    Method(
        "top", "the opposite: highest λμ removed", edit_opposite, (0.001, 0.003, 0.01, 0.03, 0.1),
        ("basis",),
    ),
    Method(
        "balanced-subnet", "BalancedSubnet",
        forget_by(lambda ratio: BalancedSubnet(
            ratio=ratio, clean_weight=0.5, learning_rate=3.0, epochs=10
        )),
        (0.005, 0.01, 0.02, 0.04, 0.08), supervised=True,
    ),
    Method(
        "subnet", "Subnet",
        forget_by(lambda ratio: Subnet(ratio=ratio, learning_rate=3.0, epochs=20)),
        (0.0025, 0.005, 0.01, 0.02, 0.04), supervised=True,
    ),
    Method(
        "durable", "Durable", forget_by(lambda ratio: Durable(ratio=ratio)),
        (0.002, 0.005, 0.01, 0.02, 0.035, 0.06), supervised=True,
    ),
    Method(
        "greedy", "Greedy", forget_by(lambda ratio: Greedy(ratio=ratio, at_once=10)),
        (0.0001, 0.0002, 0.0005, 0.001), supervised=True,
    ),
    Method(
        "gradient-ascent", "gradient ascent + descent",
        forget_by(lambda epochs: GradientAscent(
            retain=5.0, learning_rate=1e-4, epochs=int(epochs)
        )),
        (5, 10, 20, 30, 40), supervised=True,
    ),
    Method(
        "npo", "NPO + descent",
        forget_by(lambda epochs: NPO(
            beta=1.0, retain=5.0, learning_rate=2e-4, epochs=int(epochs)
        )),
        (5, 10, 20, 40), supervised=True,
    ),
)  # fmt: skip

# The context of spans is ordinary text: only the span is to be forgotten.
_PRETRAINED = (
    Method("kfac", "**K-FAC**, λμ", edit_by("kfac"), (0.98, 0.95, 0.9, 0.8), ("basis",)),
    Method("ekfac", "EK-FAC, Λ", edit_by("ekfac"), (0.98, 0.95, 0.9, 0.8), _CORRECTED),
    Method(
        "kfac-saliency", "λμC²", edit_by("kfac_saliency"), (0.98, 0.95, 0.9, 0.8), ("basis",)
    ),
    Method("g-only", "λ alone", edit_by("g_only"), (0.98, 0.95, 0.9, 0.8), ("basis",)),
    Method("a-only", "μ alone", edit_by("a_only"), (0.98, 0.95, 0.9, 0.8), ("basis",)),
    Method("svd", "truncated SVD", edit_by("svd"), (0.995, 0.98, 0.95, 0.9), ("singular",)),
    Method(
        "balanced-subnet", "BalancedSubnet",
        forget_by(lambda ratio: BalancedSubnet(
            ratio=ratio, clean_weight=0.5, learning_rate=3.0, epochs=10, scored="suffix"
        )),
        (0.01, 0.03, 0.1), supervised=True,
    ),
    Method(
        "npo", "NPO + descent",
        forget_by(lambda epochs: NPO(
            beta=1.0, retain=5.0, learning_rate=1e-4, epochs=int(epochs)
        )),
        (4, 8, 16), supervised=True,
    ),
    Method(
        "gradient-ascent", "gradient ascent + descent",
        forget_by(lambda epochs: GradientAscent(
            retain=5.0, learning_rate=5e-5, epochs=int(epochs), scored="suffix"
        )),
        (4, 8, 16), supervised=True,
    ),
    Method(
        "durable", "Durable", forget_by(lambda ratio: Durable(ratio=ratio, scored="suffix")),
        (0.002, 0.01, 0.03), supervised=True,
    ),
    Method("random", "random pairs", edit_by("random"), (0.999999, 0.9999, 0.99), ("basis",)),
)  # fmt: skip

METHODS: dict[str, tuple[Method, ...]] = {"lm": _TRAINED, "smollm": _PRETRAINED}
