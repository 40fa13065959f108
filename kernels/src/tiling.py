"""Tile sizes of the kernels: a static table per architecture, and a wave model to choose.

Nothing is tuned at run time: an accumulating kernel that tried tiles on the caller's sums would
change them. ``benchmarks/tune.py`` measures every entry on a GPU and prints the rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from curvfast.kernels.triangle import tiles_to_compute

TILE = 128
ARCHITECTURES = (80, 90, 100)
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# Memory bandwidth for partial sums, in bytes per second, written once and read once.
_BANDWIDTH = {80: 1.5e12, 90: 4.0e12, 100: 6.0e12}
# Dense-equivalent FLOP/s of whole waves by block width: models, until benchmarks/tune.py ran.
_RATES = {
    (80, False): 230e12,
    (90, False): 620e12,
    (90, True): 700e12,
    (100, False): 1000e12,
    (100, True): 1400e12,
}
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_LEAST_STEPS = 8


@dataclass(frozen=True)
class Tiling:
    """The tiling of one launch into programs."""

    block_k: int
    """Rows multiplied at a time."""
    warps: int
    stages: int
    paired: bool = False
    """Whether a program computes two tiles side by side."""
    parts: int = 1
    """Programs that share a tile, where two sums would overflow the registers of one."""
    splits: int = 1
    """Programs that share a tile's rows, each with a separate partial sum (split-K)."""


_WHOLE_ROWS = {paired: Tiling(64, 8, 4, paired=paired) for paired in (False, True)}
# (architecture, precision, two sums): chosen so that no register spills, by compiling each.
_CHOSEN_ROWS = {
    **{(a, "native", False): Tiling(64, 8, 3) for a in ARCHITECTURES},
    (90, "native", True): Tiling(32, 8, 2, parts=2),
    (100, "native", True): Tiling(32, 8, 3, parts=2),
    (80, "native", True): Tiling(32, 8, 3, parts=4),
    **{(a, "bf16x4", False): Tiling(32, 8, 2) for a in (90, 100)},
    (80, "bf16x4", False): Tiling(32, 8, 2, parts=2),
    (90, "bf16x4", True): Tiling(32, 8, 2, parts=2),
    (100, "bf16x4", True): Tiling(32, 8, 1, parts=2),
    (80, "bf16x4", True): Tiling(32, 8, 1, parts=4),
    **{(a, "tf32", False): Tiling(32, 8, 3) for a in ARCHITECTURES},
    **{(a, "tf32", True): Tiling(32, 8, 2, parts=2) for a in (90, 100)},
    (80, "tf32", True): Tiling(32, 8, 2, parts=4),
    **{(a, "ieee", False): Tiling(16, 8, 3) for a in ARCHITECTURES},
    **{(a, "ieee", True): Tiling(16, 8, 2, parts=2) for a in ARCHITECTURES},
}
_GROUP = {a: Tiling(64, 8, 3) for a in ARCHITECTURES}
_INTERPRETED = Tiling(32, 4, 1)


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a product of two matrices."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


_STAIRCASE = {
    **{(a, "tf32x3"): Blocks(128, 128, 32, 8, 2) for a in (90, 100)},
    (80, "tf32x3"): Blocks(64, 128, 32, 8, 2),
    **{(a, "tf32"): Blocks(128, 128, 32, 8, 3) for a in ARCHITECTURES},
    **{(a, "ieee"): Blocks(128, 128, 16, 8, 3) for a in ARCHITECTURES},
}
_ENERGIES = {
    **{(a, "ieee"): Blocks(128, 128, 64, 8, 3) for a in ARCHITECTURES},
    **{(a, "tf32x3"): Blocks(128, 128, 32, 8, 2) for a in (90, 100)},
    (80, "tf32x3"): Blocks(64, 128, 32, 8, 2),
}
INTERPRETED_STAIRCASE = Blocks(32, 32, 32, 4, 1)


def architecture(capability: tuple[int, int]) -> int:
    """Return the architecture of the table for a compute capability."""
    number = 10 * capability[0] + capability[1]
    return max([a for a in ARCHITECTURES if a <= number], default=ARCHITECTURES[0])


def whole_rows(d: int, rows: int, arch: int) -> Tiling:
    """Return the fastest tiling for whole rows of 16-bit features, by the wave model.

    Args:
        d: Features.
        rows: Number of rows, times four for the parts of float32 rows.
        arch: 90 or 100.
    """
    candidates = [
        replace(tiling, splits=splits)
        for tiling in _WHOLE_ROWS.values()
        for splits in _allowed_splits(rows, tiling.block_k)
    ]
    return min(candidates, key=lambda tiling: (seconds(tiling, d, rows, arch), tiling.splits))


def chosen_rows(d: int, rows: int, arch: int, precision: str, two_sums: bool) -> Tiling:
    """Return the tiling for chosen or weighted rows.

    Args:
        d: Features.
        rows: Rows.
        arch: 80, 90 or 100.
        precision: ``"native"`` for 16-bit features, or how float32 ones are multiplied.
        two_sums: Whether two sums are computed in one pass.
    """
    tiling = _CHOSEN_ROWS[arch, precision, two_sums]
    candidates = [replace(tiling, splits=s) for s in _allowed_splits(rows, tiling.block_k)]
    return min(candidates, key=lambda t: (seconds(t, d, rows, arch), t.splits))


def group(arch: int) -> Tiling:
    """Return the tiling of the grouped launch."""
    return _GROUP[arch]


def staircase(arch: int, precision: str) -> Blocks:
    """Return the blocks of the staircase products."""
    return _STAIRCASE[arch, precision]


def energies(arch: int, precision: str) -> Blocks:
    """Return the blocks of the band energies; 16-bit activations are "ieee"."""
    return _ENERGIES[arch, precision]


def interpreted(rows: int, *, paired: bool = False, parts: int = 1) -> Tiling:
    """Return a tiling for Triton's interpreter, which splits all but tiny sums."""
    splits = 2 if rows > 4 * _INTERPRETED.block_k else 1
    return replace(_INTERPRETED, splits=splits, paired=paired, parts=parts)


def seconds(tiling: Tiling, d: int, rows: int, arch: int) -> float:
    """Return the model's time: whole waves of programs, then the traffic of partial sums."""
    panels = -(-d // TILE)
    programs = tiles_to_compute(panels, tiling.paired) * tiling.parts * tiling.splits
    waves = -(-programs // _MULTIPROCESSORS[arch])
    columns = TILE * (2 if tiling.paired else 1) // tiling.parts
    flops = 2 * TILE * columns * (rows / tiling.splits)
    rate = _RATES[arch, tiling.paired] / _MULTIPROCESSORS[arch]
    partial = 0.0
    if tiling.splits > 1:
        stored = 4 * TILE * TILE * panels * (panels + 1) // 2
        partial = 2 * tiling.splits * stored / _BANDWIDTH[arch]
    return waves * flops / rate + partial


def table() -> list[tuple[str, int, str, bool, Tiling]]:
    """Return every entry: kernel, architecture, precision, whether two sums, tiling."""
    whole = [("tiles", a, "native", False, t) for a in (90, 100) for t in _WHOLE_ROWS.values()]
    chosen = [("rows", a, p, two, t) for (a, p, two), t in _CHOSEN_ROWS.items()]
    return whole + chosen + [("group", a, "native", False, t) for a, t in _GROUP.items()]


def block_table() -> list[tuple[str, int, str, Blocks]]:
    """Return every entry of the products with bands: kernel, architecture, precision, blocks."""
    staircases = [(k, a, p, b) for (a, p), b in _STAIRCASE.items() for k in ("expand", "contract")]
    return staircases + [("band_energies", a, p, b) for (a, p), b in _ENERGIES.items()]


def _allowed_splits(rows: int, block_k: int) -> list[int]:
    steps = -(-rows // block_k)
    return [s for s in _SPLITS if s == 1 or steps // s >= _LEAST_STEPS]
