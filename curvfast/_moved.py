"""Import forwarding: old module paths still import, with a DeprecationWarning."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old paths of public names, and those the README or the changelog named, by where they are now.
MOVED = {
    "analysis.mining": ["evals.mining"],
    "convergence": ["collection.convergence"],
    "core": ["kfac"],
    "core.corrections": ["kfac.corrections"],
    "core.eigenbasis": ["kfac.eigenbasis", "kfac.layer_basis"],
    "core.factors": ["kfac.factors", "kfac.layer_factors"],
    "core.mask": ["kfac.selection.mask"],
    "core.power_law": ["kfac.spectrum"],
    "core.selection": ["kfac.selection.kept_pairs", "kfac.selection.staircase"],
    "correcting": ["collection.corrections"],
    "correction": ["collection.corrections"],
    "curvature": ["collection.curvature"],
    "driver": ["collection.collect"],
    "edit_report": ["editing.report"],
    "evals.harness": ["evals.lm_eval"],
    "selecting": ["kfac.select"],
    "writing": ["export"],
    "writing.card": ["export.model_card"],
    "writing.factored": ["export.factored"],
    "writing.lora": ["export.lora"],
    "writing.patch": ["export.patch"],
}


class _Forward(ModuleType, Loader):
    """Module and loader of an old path: looks its names up in the modules that hold them now."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self

    def exec_module(self, module: ModuleType) -> None:
        new = ", ".join(f"curvfast.{name}" for name in MOVED[_short(self.__name__)])
        warnings.warn(f"{self.__name__} is now {new}", DeprecationWarning, stacklevel=2)

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__"):
            for new in MOVED[_short(self.__name__)]:
                module = import_module(f"curvfast.{new}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder):
    """Meta path finder of old paths; last on sys.meta_path, so that existing modules come first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("curvfast.") or _short(fullname) not in MOVED:
            return None
        package = any(old.startswith(f"{_short(fullname)}.") for old in MOVED)
        return ModuleSpec(fullname, _Forward(fullname), is_package=package)


def _short(name: str) -> str:
    return name.removeprefix("curvfast.")


def install() -> None:
    """Add the finder of old paths to sys.meta_path, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
