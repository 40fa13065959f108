"""Which factors need all their eigenpairs for an edit at a given mass, and which the leading ones.

A pair (i, j) is kept if λᵢ μⱼ ≥ τ, so eigenvectors past the last with λₖ μ₁ ≥ τ are never used. The
leading ones are looked for first, a few, then some, then all; a layer is content once the last
value found of each factor is itself out of reach of τ.
"""

from __future__ import annotations

from collections.abc import Mapping

from curvfast.core.decomposition import NARROW, Spectrum
from curvfast.core.staircase import staircases_by_mass, used_ranks

# Shares of a factor's eigenpairs looked for first: past 1/64 all are found as soon.
_SHARES = (1 / 256, 1 / 64)
_FEWEST = 8
_ALL = len(_SHARES)


class LeadingSearch:
    """How far each factor's decomposition has come, and what is still needed."""

    def __init__(
        self,
        widths: Mapping[str, int],
        layers: Mapping[str, tuple[str, str]],
        mass: float | None,
    ) -> None:
        """Start with nothing found.

        Args:
            widths: d of each factor.
            layers: The factors (A, G) of each layer.
            mass: ρ of the edit to come; None needs everything.
        """
        self.widths = widths
        self._layers = layers
        self._mass = mass
        self._level = {k: _ALL if mass is None or d < NARROW else 0 for k, d in widths.items()}
        self.found: dict[str, Spectrum] = {}
        """The best known of each factor."""

    def wanted(self) -> list[str]:
        """Return the factors to decompose next, the largest first; none when all is known."""
        self._review()
        open_ = [key for key in self.widths if key not in self.found]
        # The largest first: the last to finish are then the smallest.
        return sorted(open_, key=lambda key: -self.widths[key])

    def count(self, key: str) -> int | None:
        """Return how many leading eigenpairs of a factor to look for; None means all."""
        level = self._level[key]
        return None if level == _ALL else max(_FEWEST, int(_SHARES[level] * self.widths[key]))

    def note(self, key: str, spectrum: Spectrum | None) -> None:
        """Take in what was found; None sends the factor on to the next level."""
        if spectrum is None:
            self._level[key] += 1
        else:
            self.found[key] = spectrum

    def _review(self) -> None:
        """Send on the factors whose leading eigenpairs do not suffice for a layer of theirs."""
        ready = {n: (g, a) for n, (a, g) in self._layers.items() if {a, g} <= self.found.keys()}
        short = {key for keys in ready.values() for key in keys if not self._whole(key)}
        if self._mass is None or not short:
            return
        values = {key: spectrum.values for key, spectrum in self.found.items()}
        # A layer without curvature has nothing to keep, at any mass.
        spectra = {
            name: (values[g], values[a])
            for name, (g, a) in ready.items()
            if values[g][0] > 0 and values[a][0] > 0
        }
        lacking: set[str] = set()
        for name, kept in staircases_by_mass(spectra, [self._mass])[0].items():
            for key, used in zip(ready[name], used_ranks(kept), strict=True):
                if key in short and used >= self.found[key].vectors.shape[1]:
                    lacking.add(key)
        for key in lacking:
            self.found.pop(key)
            self._level[key] += 1

    def _whole(self, key: str) -> bool:
        return self._level[key] == _ALL
