"""What runs on a GPU machine, the most valuable first, in two parts of less than five minutes.

Part A: the extensions are built beside the rest; kernels are compiled, then checked, then second
moments are measured, then a training step. Part B: the tests, the other operations, torch's
eigendecompositions, a sanitizer, and with what is left the tilings.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

from device_steps import Step

Failed = Callable[[], set[str]]
BUILD = "build/extensions"
_ROWS = 16_384
_SECOND_MOMENTS = (4096, 8192, 14336, 11008, 2048, 1024, 768, 3072)
_CHECKED = {
    "bf16": (
        "whole-bf16", "whole-bf16-narrow", "sequences", "whole-fp16", "chosen-bf16", "lengths",
        "weighted-bf16", "two-sums-bf16", "grouped", "grouped-chosen",
    ),
    "fp32": ("whole-fp32", "chosen-fp32", "weighted-fp32", "two-sums-fp32"),
    "other": ("projection", "energies-bf16", "energies-fp32", "sampled-32000", "sampled-50257"),
}  # fmt: skip
_EIGH = (4096, 8192, 11008, 14336)
_TUNED = (4096, 14336, 8192, 2048, 768)
_PROCESSES = 12
_SANITIZED = ("grouped", "chosen-bf16", "energies-bf16")


def steps(part: str, dry_run: bool, failed: Failed) -> Iterator[Step]:
    """Return the steps of a part.

    Args:
        part: "A" or "B".
        dry_run: A few units of every kind, small, for the interpreter.
        failed: Returns the units that failed so far: what comes later looks into them first.
    """
    yield Step("extensions", (BUILD,), 120, background=True)
    if dry_run:
        yield from {"A": _rehearsed_a, "B": _rehearsed_b}[part]()
    else:
        yield Step("device", ("device",), 30)
        yield from _part_a() if part == "A" else _part_b(failed)


def _part_a() -> Iterator[Step]:
    second = _second_moments("bfloat16")
    grouped = tuple(f"grouped_second_moments/32/4096/{d}" for d in (1024, 768))
    masked = (f"masked_second_moment/{_ROWS}/4096",)
    step = ("end_to_end/4096/14336/2/1024", "end_to_end/2048/8192/4/1024")
    warmed = tuple(f"warm/{unit}" for unit in (*second, *grouped, *masked, *step))
    yield Step("compile", warmed, 45, processes=_PROCESSES)
    yield _checks(*_CHECKED["bf16"], *_CHECKED["fp32"], *_CHECKED["other"])
    yield Step("ceilings", ("ceilings",), 20)
    yield Step(
        "second moments, bf16", second, 80, 25, needs=_check("whole-bf16", "whole-bf16-narrow")
    )
    yield Step("grouped", grouped, 30, 20, needs=_check("grouped"))
    needs = _check("chosen-bf16", "weighted-bf16", "two-sums-bf16")
    yield Step("masked", masked, 30, needs=needs)
    needs = _check("sequences", "chosen-bf16", "grouped")
    yield Step("end to end", step, 60, 45, needs=needs)
    fp32 = _second_moments("float32")
    yield Step("second moments, fp32", fp32, 60, 25, needs=_check("whole-fp32"))


def _part_b(failed: Failed) -> Iterator[Step]:
    yield _checks(*_CHECKED["other"])
    yield Step("tests", ("tests",), 110)
    projected = tuple(f"projection/4096/{c}/{m}" for c in (4096, 11008) for m in (0.8, 0.6, 0.95))
    yield Step("projection", projected, 30, 15, needs=_check("projection"))
    energies = tuple(f"band_energies/{_ROWS}/{d}" for d in (4096, 2048))
    yield Step("band energies", energies, 20, 15, needs=_check("energies-bf16"))
    sampled = tuple(f"sampled_gradient/2048/{c}" for c in (128256, 32000, 50257))
    needs = _check("sampled-32000", "sampled-50257")
    yield Step("sampled gradients", sampled, 20, 15, needs=needs)
    # The native core's copies are checked by the tests and by the case itself.
    packed = tuple(f"packed_sum/{d}" for d in (4096, 14336, 768))
    yield Step("packed sums", packed, 20, needs=(BUILD,))
    eigh = (
        *(f"eigh/{d}/{t}/default" for t in ("float64", "float32") for d in _EIGH),
        *(f"eigh/4096/float64/{library}" for library in ("cusolver", "magma")),
    )
    yield Step("eigendecompositions", eigh, 80, 40, alone=True)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        broken = [unit.split("/")[1] for unit in sorted(failed()) if unit.startswith("check/")]
        units = tuple(f"check/{name}/small" for name in (broken or _SANITIZED)[:3])
        prefix = (sanitizer, "--error-exitcode", "9")
        yield Step("sanitizer", units, 60, 30, alone=True, prefix=prefix)
    yield Step("tilings", tuple(f"tune/{_ROWS}/{d}" for d in _TUNED), 300)


def _rehearsed_a() -> Iterator[Step]:
    checks = _check(*_CHECKED["bf16"], *_CHECKED["fp32"])
    measured = (
        "second_moment/bfloat16/96/40", "grouped_second_moments/4/64/32",
        "masked_second_moment/96/40", "end_to_end/32/64/1/16",
    )  # fmt: skip
    warmed = tuple(f"warm/{unit}" for unit in measured)
    yield Step("compile and checks", ("device", *warmed, *checks), 240)
    yield Step("measured", ("ceilings", *measured), 120, needs=checks)


def _rehearsed_b() -> Iterator[Step]:
    checks = _check(*_CHECKED["other"], "packed")
    measured = (
        "projection/70/90/0.8", "band_energies/96/40", "sampled_gradient/8/300", "packed_sum/40",
        "second_moment/float32/96/40", "eigh/32/float64/default", "tune/64/40",
    )  # fmt: skip
    yield Step("checks", ("device", *checks), 120, needs=(BUILD,))
    yield Step("tests", ("tests/two_sums/1",), 120)
    yield Step("measured", measured, 120, needs=checks)


def _checks(*names: str) -> Step:
    """Return the checks, each in a process of its own: what fails on a GPU there stays broken."""
    return Step("checks", _check(*names), 60, 40, processes=_PROCESSES, alone=True)


def _check(*names: str) -> tuple[str, ...]:
    return tuple(f"check/{name}" for name in names)


def _second_moments(dtype: str) -> tuple[str, ...]:
    return tuple(f"second_moment/{dtype}/{_ROWS}/{d}" for d in _SECOND_MOMENTS)
