"""The catalogue of studies by name; a new one needs a module, an entry here and in ``names``."""

from __future__ import annotations

from curvfast.studies import (
    architectures,
    detector,
    dynamics,
    figure2,
    figure3,
    figure4,
    inversion,
    recovery,
    spectra,
    table1,
    table2,
)
from curvfast.studies.study import Study

STUDIES: dict[str, Study] = {
    "figure2": figure2.STUDY,
    "figure3": figure3.STUDY,
    "figure4": figure4.STUDY,
    "table1": table1.STUDY,
    "table2": table2.STUDY,
    "detector": detector.STUDY,
    "spectra": spectra.STUDY,
    "inversion": inversion.STUDY,
    "dynamics": dynamics.STUDY,
    "architectures": architectures.STUDY,
    "recovery": recovery.STUDY,
}
