"""Studies by name, run seed by seed; each seed is kept on disk once it is measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from curvfast.errors import InputError, StorageError
from curvfast.experiments.studies import (
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
from curvfast.experiments.studies.study import Figures, Study, StudyConfig
from curvfast.model.identity import versions
from curvfast.storage import write_json

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


SCHEMA_VERSION = 1


def run(
    name: str,
    seeds: Sequence[int],
    out: Path,
    report_stage: Callable[[str], None],
    *,
    quick: bool = False,
    again: bool = False,
    data: Path | None = None,
) -> list[Figures]:
    """Measure a study at every seed without saved results, and draw it.

    Args:
        name: One of :data:`curvfast.experiments.studies.runs.STUDIES`.
        seeds: Seeds of everything random, one run each.
        out: Folder for ``NAME/seed-N.json`` of each seed, and ``NAME/figure.png``.
        report_stage: Called with one line before each stage.
        quick: Whether to run a version of seconds.
        again: Whether to repeat saved measurements.
        data: Folder of Fashion-MNIST's files; None looks in the usual places.

    Returns:
        The figures of each seed, in the order of ``seeds``.

    Raises:
        InputError: If there is no seed, or one is named twice.
        StorageError: If a file of an earlier run is damaged or newer than this library.
    """
    if not seeds or len({*seeds}) < len(seeds):
        raise InputError(f"seeds={list(seeds)}: pass one or more, each once")
    study, folder = STUDIES[name], out / name
    found = []
    for seed in seeds:
        path = folder / f"seed-{seed}.json"
        kept = None if again or not path.is_file() else read(path)
        if kept is None or kept["quick"] != quick:
            report_stage(f"{name}, seed {seed}")
            kept = _measured(name, StudyConfig(seed, quick, report_stage, data))
            write_json(path, kept)
        found.append(kept["figures"])
    study.picture(found).savefig(folder / "figure.png")
    report_stage(f"wrote {folder}/figure.png and the figures of {len(found)} seeds beside it")
    return found


def read(path: Path) -> dict[str, Any]:
    """Read the saved results of one seed.

    Args:
        path: A ``seed-N.json``.

    Returns:
        Its content: ``figures`` and their provenance.

    Raises:
        StorageError: If the file is damaged, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        complete = {"figures", "quick", "seed", "study"} <= content.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error!r}; remove it") from error
    if version != SCHEMA_VERSION or not complete:
        raise StorageError(
            f"{str(path)!r} is no study of schema {SCHEMA_VERSION}, which this library reads; "
            "upgrade curvfast, or measure it again"
        )
    return dict(content)


def _measured(name: str, config: StudyConfig) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    figures = STUDIES[name].measure(config)
    return {
        "schema_version": SCHEMA_VERSION,
        "study": name,
        "seed": config.seed,
        "quick": config.quick,
        "command": f"curvfast study {name} --seeds {config.seed}{' --quick' * config.quick}",
        "figures": figures,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "versions": versions(),
    }
