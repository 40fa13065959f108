"""The Kronecker-factored eigenbasis: eigenvectors of A and G, by descending eigenvalue."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, ClassVar

from torch import Tensor

from curvfast import storage
from curvfast.errors import InputError
from curvfast.kfac.evidence import KEY, evidence_of, merged
from curvfast.kfac.layer_basis import LayerBasis as LayerBasis
from curvfast.kfac.layer_basis import StoredBasis
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.kfac.layer_mapping import Measured
from curvfast.kfac.marginals import reordered
from curvfast.kfac.selection.kept_pairs import Frame, Selection
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.rule import Rule
from curvfast.kfac.selection.scores import Scores, Term, masks, sum_of, unit_of
from curvfast.kfac.selection.staircase import Staircase, staircases, staircases_by_mass
from curvfast.kfac.task_curvature import TaskCurvature, curvature_along

KIND = "curvfast-eigenbasis"


@dataclass(frozen=True, eq=False, repr=False)
class Eigenbasis(Measured[LayerBasis]):
    """Kronecker-factored eigenbases of many layers, by layer name."""

    _noun: ClassVar[str] = "eigenbasis"
    layers: Mapping[str, LayerBasis]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance of the factors; see :class:`curvfast.Factors`."""
    tasks: tuple[TaskCurvature, ...] = ()
    """Curvature of other corpora, added to λᵢμⱼ; see :meth:`with_task`."""
    frame: Frame = "curvature"
    """``"curvature"``, or ``"singular"`` for singular vectors of the weights."""

    def keep(
        self,
        *,
        mass: float | None = None,
        pairs: int | Mapping[str, int] | None = None,
        fraction: float | Mapping[str, float] | None = None,
        globally: bool = False,
    ) -> Selection:
        """Select eigenpair products λᵢμⱼ of every layer, the largest first; pass exactly one rule.

        Args:
            mass: Share ρ in (0, 1] of each layer's curvature mass Σλᵢμⱼ to reach. Every pair that
                ties with the one that reaches it is kept as well.
            pairs: Exact number of pairs a layer, or by layer name; ties are broken in row order.
            fraction: Exactly this share of each layer's d_out · d_in pairs, rounded; or by name.
            globally: With ``mass``: one threshold for all layers, and ρ of their mass together; a
                layer of little curvature then keeps little.

        Returns:
            A staircase for each layer; with tasks of :meth:`with_task` a mask.

        Raises:
            InputError: If not exactly one rule is given, it is out of range, or asks for more than
                the leading eigenpairs a basis holds; or if this holds singular vectors.
            LayerNotFound: If a rule is given by layer name, and one is missing.
        """
        return self.keep_by(Rule(mass, fraction, pairs, globally))

    def keep_by(self, rule: Rule) -> Selection:
        """Select as :meth:`keep` does, by a :class:`Rule`, with the same errors."""
        self.require_curvature()
        if self.tasks:
            return self._with_frame(masks(self.scores(), rule))
        return self._with_frame(staircases(self.spectra(), rule))

    def keep_each(self, masses: Sequence[float]) -> list[Selection]:
        """Select at several masses in one search, as :meth:`keep` does at one.

        Args:
            masses: ρ, each in (0, 1].

        Returns:
            A selection for each mass.

        Raises:
            InputError: If a mass is out of range, or asks for more than a basis holds; or if this
                holds singular vectors.
        """
        self.require_curvature()
        if self.tasks:
            return [self.keep(mass=mass) for mass in masses]
        return [self._with_frame(kept) for kept in staircases_by_mass(self.spectra(), masses)]

    def _with_frame(
        self, kept: Mapping[str, Staircase | Mask], importance: str = "kfac"
    ) -> Selection:
        """Return ``kept`` as a selection of this basis's pairs.

        Raises:
            InputError: If it needs more than the leading eigenpairs a basis holds.
        """
        for name, own in kept.items():
            self[name].require(name, own)
        return Selection(kept, importance, self.frame, self.totals())

    def require_curvature(self) -> None:
        """Check that pairs can be ranked by curvature.

        Raises:
            InputError: If this holds singular vectors.
        """
        if self.frame != "curvature":
            raise InputError(
                f"these are {self.frame} vectors, which have no curvature to rank by: pass "
                "importance='svd', or a basis of Factors.eigh()"
            )

    def with_task(
        self, task: Mapping[str, LayerFactors], weight: float = 1.0, *, normalize: bool = True
    ) -> Eigenbasis:
        """Return this basis with the curvature of a task added where pairs are ranked.

        A pair's score becomes λᵢμⱼ + α · λᵗᵢ μᵗⱼ, where λᵗᵢ = uᵢᵀ Gᵗ uᵢ and μᵗⱼ = vⱼᵀ Aᵗ vⱼ are the
        task's curvature along *this* basis's eigenvectors, which stay as they are. Kept pairs form
        a mask, not a staircase. An edit then spares more of what the task needs: of arithmetic,
        say, added to general text. Tasks add up.

        With α below 0 the task is a forget set: scores below 0, where it bends the loss more than
        everything else, count as 0 and are removed first. ``mass`` is then a share of the rest.

        Args:
            task: Factors of the task's corpus, of this basis's layers at least, G of the summed
                loss as here, and the rows counted by the same rule. A mapping that carries no
                provenance is a convention.
            weight: α; 0 changes nothing.
            normalize: Whether the task's mass Σλᵗ Σμᵗ is first made equal to this basis's, layer by
                layer: α = 1 then weights both corpora equally, however confident the model is on
                either. Otherwise curvatures are added per row, as measured.

        Returns:
            A basis that :meth:`keep`, :func:`curvfast.select` and :func:`curvfast.edit` take.

        Raises:
            InputError: If ``weight`` is not finite, the basis holds leading eigenpairs or singular
                vectors, or the task's factors hold NaN, infinity or nothing but zeros; or if the
                two were measured by different rules (:attr:`known`).
            LayerNotFound: If the task lacks layers of this basis; they are named.
            ShapeError: If a layer is of another width there.
        """
        self.require_curvature()
        added = curvature_along(self, task, weight, normalize)
        of_task = evidence_of(getattr(task, "provenance", {}), self)
        known = merged(self.known, of_task, ("the basis", "the task"))
        if not weight:
            return self
        facts = {} if known == self.known else {KEY: known.to_dict()}
        return replace(self, tasks=(*self.tasks, added), provenance={**self.provenance, **facts})

    def with_marginals(self, factors: Mapping[str, LayerFactors]) -> Eigenbasis:
        """Return the basis with marginals of the EK-FAC correction instead of eigenvalues.

        Λ_ij ≈ rᵢ cⱼ / ΣΛ, from the correction's row sums r and column sums c (George et al., arXiv
        1806.03884; per position), which the pass that measured ``factors`` summed too. Values and
        vectors are in descending order of these, so all that takes a basis takes this one: the
        products of its values are the estimate. Where g and a are independent they are λ and μ.

        Layers that shared the eigenvectors of A no longer do: their orders differ.

        Args:
            factors: What this basis was decomposed from, collected with ``marginals=True``.

        Returns:
            A basis of the same layers, in memory.

        Raises:
            InputError: If the weighted moments were not collected, or the basis holds leading
                eigenvectors only, or tasks, which are to be added after.
            LayerNotFound: If the factors lack a layer.
            BasisMismatch: If they are of other widths.
        """
        if self.tasks:
            raise InputError(
                "marginals order eigenvectors anew, and tasks are along the old ones: call "
                "with_marginals() before with_task()"
            )
        ordered = {n: LayerBasis(*reordered(n, own, factors[n])) for n, own in self.items()}
        return replace(self, layers=ordered)

    def restricted(self, names: Iterable[str]) -> Eigenbasis:
        """Return the basis restricted to some layers.

        Raises:
            LayerNotFound: If there is none of one of them.
        """
        return replace(self, layers={name: self[name] for name in names})

    def spectra(self) -> dict[str, Term]:
        """Return (λ, μ) of each layer, without tasks."""
        return {name: (own.values_g, own.values_a) for name, own in self.layers.items()}

    def totals(self) -> dict[str, float]:
        """Return ΣλΣμ of each layer, which identifies this basis."""
        return {name: float(g.sum() * a.sum()) for name, (g, a) in self.spectra().items()}

    def scores(self) -> Scores:
        """Return the curvature of every pair, tasks included."""
        terms = {name: self._terms(name) for name in self}
        shapes = {name: (len(own[0][0]), len(own[0][1])) for name, own in terms.items()}
        return Scores(shapes, lambda name: sum_of(terms[name]), unit_of(terms.values()))

    def _terms(self, name: str) -> list[Term]:
        g, a = self[name].values_g.cpu().double(), self[name].values_a.cpu().double()
        mass = float(g.sum() * a.sum())
        return [(g, a), *(task.term(name, mass) for task in self.tasks)]

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write eigenvalues, eigenvectors (shared ones once) and tasks; called on one rank.

        Raises:
            StorageError: If a file cannot be written; nothing saved before is lost.
        """
        with storage.FolderWriter(directory, KIND) as writer:
            keys: dict[Hashable, str] = {}
            layers = {}
            for name, basis in self.items():
                if basis.key_a not in keys:
                    keys[basis.key_a] = f"a.{name}"
                    writer.add(stored_part(f"a.{name}", basis.values_a, basis.vectors_a))
                writer.add(stored_part(f"g.{name}", basis.values_g, basis.vectors_g))
                layers[name] = {"a": keys[basis.key_a], "g": f"g.{name}"}
            tasks = []
            for number, task in enumerate(self.tasks):
                writer.add(task.tensors(f"task{number}"))
                tasks.append({"weight": task.weight, "normalize": task.normalize})
            writer.finish(
                {
                    "layers": layers, "provenance": dict(self.provenance), "frame": self.frame,
                    "tasks": tasks,
                }
            )  # fmt: skip

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str], *, lazy: bool = False) -> Eigenbasis:
        """Read what :meth:`save_pretrained`, or :meth:`Factors.eigh` with a directory, wrote.

        Args:
            directory: The folder.
            lazy: Whether a layer is read from disk at each use and not cached: for bases larger
                than memory.

        Returns:
            The eigenbasis.

        Raises:
            StorageError: If the folder is missing, foreign, damaged, or of a newer format.
        """
        meta, stored = storage.open_folder(directory, kind=KIND)
        names = {name: (entry["a"], entry["g"]) for name, entry in meta["layers"].items()}
        tasks = tuple(
            TaskCurvature.from_tensors(stored, f"task{number}", names, **facts)
            for number, facts in enumerate(meta.get("tasks", ()))
        )
        rest = meta.get("provenance", {}), tasks, meta.get("frame", "curvature")
        if lazy:
            return cls({n: StoredBasis(stored, *keys) for n, keys in names.items()}, *rest)
        tensors = dict(stored.items())
        layers = {
            name: LayerBasis(
                tensors[f"{a}.values"], tensors[f"{a}.vectors"],
                tensors[f"{g}.values"], tensors[f"{g}.vectors"],
            )
            for name, (a, g) in names.items()
        }  # fmt: skip
        return cls(layers, *rest)


def stored_part(key: str, values: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one basis as they are named on disk."""
    return {f"{key}.values": values, f"{key}.vectors": vectors}
