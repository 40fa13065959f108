def staircase_by_mass(
    g: int, rows: int, a: int, columns: int, mass: float, widths: int
) -> tuple[float, int, float]: ...
def staircase_by_pairs(
    g: int, rows: int, a: int, columns: int, pairs: int, widths: int
) -> tuple[float, int, float]: ...
def staircases_by_mass(
    layers: list[tuple[int, int, int, int, int]], masses: list[float], workers: int
) -> list[tuple[float, int, float]]: ...
def staircases_by_common_mass(
    layers: list[tuple[int, int, int, int, int]], mass: float
) -> float: ...
def scores_by_mass(
    scores: int, size: int, mass: float, mask: int, bytes: int, workers: int
) -> tuple[float, int, float]: ...
def multiplies_bfloat16() -> bool: ...
def add_bfloat16_rows(
    tiles: int,
    values: int,
    d: int,
    width: int,
    x: int,
    offsets: int,
    rows: int,
    scale: float,
    workers: int,
) -> None: ...
