"""Mappings by layer name whose lookup errors name the missing layer and those that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from curvfast.errors import InputError, LayerNotFound
from curvfast.kfac.evidence import KEY, Evidence, evidence_of, merged

T = TypeVar("T")
_SHOWN = 3


class ByLayer(Mapping[str, T]):
    """A mapping by layer name, over the field ``layers`` that a subclass has."""

    layers: Mapping[str, Any]
    _noun: ClassVar[str]

    def __getitem__(self, name: str) -> T:
        """Return the value of one layer.

        Raises:
            LayerNotFound: If it has none.
        """
        if name not in self.layers:
            raise LayerNotFound(
                f"no {self._noun} of layer {name!r}; there are: {', '.join(map(repr, self.layers))}"
            )
        return self._of(self.layers[name])

    def _of(self, layer: Any) -> T:
        """Return the public value of a layer, given the stored one."""
        shown: T = layer
        return shown

    def __contains__(self, name: object) -> bool:
        """Return whether a layer has a value."""
        return name in self.layers

    def __iter__(self) -> Iterator[str]:
        """Iterate over layer names."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def __repr__(self) -> str:
        """Return a line: the number of layers, and the names of the first."""
        names = ", ".join(repr(name) for name, _ in zip(self, range(_SHOWN), strict=False))
        more = ", …" if len(self) > _SHOWN else ""
        return f"<{type(self).__name__} of {len(self)} layers: {names}{more}>"


class Measured(ByLayer[T]):
    """Results of a measurement by layer name, which carry how they are known."""

    provenance: Mapping[str, Any]

    @property
    def known(self) -> Evidence:
        """How it is known which rows of each layer were counted, and the unit of G.

        ``known.rows["layer"]`` and ``known.unit`` say which rule was followed, who said so, and
        whether that was proven by the gradients, told by the caller, or is a convention, which is
        what results from before it was kept, or made by hand, have.
        """
        return evidence_of(self.provenance, self)


class Summed(Measured[T]):
    """Sums over rows by layer name, which can be added over runs, ranks or corpora."""

    def _added(
        self, other: Summed[T], add: Callable[[str, Any, Any], Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the merged layers, by ``add`` (name, one, two) where both have one; provenance.

        Raises:
            InputError: If a layer is missing on one side although it had rows, or the two were
                measured by different rules.
        """
        # An expert without tokens on one side adds nothing there.
        empty = {*self.provenance.get("unrouted", ()), *other.provenance.get("unrouted", ())}
        differing = (self.keys() ^ other.keys()) - empty
        if differing:
            raise InputError(
                f"only {self._noun} of the same layers can be added; these differ in: "
                f"{', '.join(map(repr, sorted(differing)))}"
            )
        layers = {**self.layers, **other.layers}
        for name in self.layers:
            if name in other.layers:
                layers[name] = add(name, self.layers[name], other.layers[name])
        # After the sums: of two models it says more that their widths differ.
        known = merged(self.known, other.known)
        provenance = {
            "merged": [dict(self.provenance), dict(other.provenance)],
            "unrouted": sorted(empty - layers.keys()),
            KEY: known.to_dict(),
        }
        return layers, provenance
