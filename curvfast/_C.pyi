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
    layers: list[tuple[int, int, int, int]], mass: float, workers: int
) -> list[tuple[int, float]]: ...
def scores_by_pairs(
    scores: int, rows: int, columns: int, mask: int, pairs: int, workers: int
) -> tuple[int, float]: ...
def cheapest_split(widths: int, rows: int, columns: int, band: int) -> tuple[int, int, int]: ...
def instruction_sets() -> list[tuple[str, bool]]: ...
def packed_words(d: int, rows: int, bits: int) -> int: ...
def packed_products(d: int) -> int: ...
def finite_rows(x: int, offsets: int, rows: int, d: int, type: str, workers: int) -> bool: ...
def add_float32_rows(
    tiles: int,
    values: int,
    d: int,
    width: int,
    x: int,
    offsets: int,
    rows: int,
    roots: int,
    room: int,
    words: int,
    scale: float,
    finite_only: bool,
    instructions: str,
    workers: int,
) -> bool: ...
def add_bfloat16_rows(
    tiles: int,
    values: int,
    d: int,
    width: int,
    x: int,
    offsets: int,
    rows: int,
    roots: int,
    room: int,
    words: int,
    scale: float,
    finite_only: bool,
    instructions: str,
    workers: int,
) -> bool: ...
def pack(
    matrix: int, d: int, tiles: int, values: int, width: int, bits: int, workers: int
) -> None: ...
def unpack(
    tiles: int, values: int, width: int, matrix: int, d: int, bits: int, workers: int
) -> None: ...
def mirror(matrix: int, values: int, d: int, bits: int, workers: int) -> None: ...
def scale(values: int, size: int, factor: float, bits: int, workers: int) -> None: ...
