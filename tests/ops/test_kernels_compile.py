"""Every entry of the tile tables compiles for GPUs that are not here, to the code it should be.

No GPU runs it; the machine code says whether the tensor cores are used, whether registers spill,
and whether a block fits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kernel_cache
import pytest

from curvfast.experiments.data.fetch import cache_dir
from curvfast.kernels import tiling
from curvfast.kernels.tiling import TILE, Blocks, Tiling

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
ELEMENT = {"native": "bf16", "bf16x4": "fp32", "tf32": "fp32", "ieee": "fp32"}
PROCESSES = 2


def tiles_job(arch: int, t: Tiling, layout: str, element: str, split: bool) -> dict[str, Any]:
    lead = "" if layout == "rows" else "1, "
    columns = 2 * TILE if t.paired else TILE
    return {
        "name": f"tiles-{arch}-{layout}-{element}-{'paired' if t.paired else 'single'}-{split=}",
        "module": "second_moment", "kernel": "second_moment_tiles", "arch": arch,
        "types": {
            "left": f"tensordesc<{element}[{lead}{t.block_k}, {TILE}]>",
            "right": f"tensordesc<{element}[{lead}{t.block_k}, {columns}]>",
            "out": f"tensordesc<fp32[{TILE}, {TILE}]>", "scale": "fp32", "sequences": "i32",
            "length": "i32", "panels": "i32", "splits": "i32",
        },
        "constants": {
            "TILE": TILE, "BLOCK_K": t.block_k, "PAIRED": t.paired, "LAYOUT": layout,
            "SPLIT": split, "UPCAST": False,
        },
        "aligned": [], "warps": t.warps, "stages": t.stages, "tensor_core": True,
        "untransposed": arch == 90,
    }  # fmt: skip


def rows_job(
    arch: int, precision: str, two: bool, t: Tiling, *, given: str, weights: bool, element: str
) -> dict[str, Any]:
    constants = {
        "TILE": TILE, "PARTS": t.parts, "BLOCK_K": t.block_k, "SEQUENCES": given == "lengths",
        "INDEX": given == "index", "LENGTHS": given == "lengths", "WEIGHTS": weights, "ALSO": two,
        "PRECISION": precision, "SPLIT": True, "UPCAST": False, "stride_feature": 1,
    }  # fmt: skip
    types = {
        "x": f"*{element}", "index": "*i64", "lengths": "*i32", "weights": "*fp32",
        "also_weights": "*fp32", "out": "*fp32", "also": "*fp32", "scale": "fp32", "rows": "i32",
        "length": "i32", "d": "i32", "stride_sequence": "i64", "stride_row": "i64",
        "splits": "i32", "panels": "i32",
    }  # fmt: skip
    absent = [name for name, there in (
        ("index", given == "index"), ("lengths", given == "lengths"), ("weights", weights),
        ("also_weights", two), ("also", two),
    ) if not there]  # fmt: skip
    for name in absent:
        del types[name]
    return {
        "name": f"rows-{arch}-{precision}-{element}-{given}-{weights=}-{two=}",
        "module": "second_moment_rows", "kernel": "second_moment_rows", "arch": arch,
        "types": types, "constants": {**constants, **dict.fromkeys(absent)},
        "aligned": ["x", "out", "d", "stride_row"], "warps": t.warps, "stages": t.stages,
        "tensor_core": precision != "ieee", "untransposed": False,
    }  # fmt: skip


def blocks_job(kernel: str, arch: int, precision: str, b: Blocks) -> dict[str, Any]:
    half = kernel == "band_energies" and precision == "ieee"
    element = "bf16" if half else "fp32"
    sizes = {"BLOCK_M": b.block_m, "BLOCK_N": b.block_n, "BLOCK_K": b.block_k}
    constants: dict[str, Any] = {**sizes, "PRECISION": precision}
    if kernel == "expand":
        types = dict.fromkeys(("t", "v", "c"), "*fp32") | dict.fromkeys(
            ("widths", "first_tiles"), "*i32"
        )
        types |= dict.fromkeys(("rows", "n", "columns", "row_blocks"), "i32")
        types |= dict.fromkeys(("stride_t_row", "stride_v_n"), "i64")
        constants |= {"stride_t_n": 1, "stride_v_column": 1}
        aligned = ["t", "v", "c", "n", "columns", "stride_t_row", "stride_v_n"]
    elif kernel == "contract":
        types = dict.fromkeys(("c", "v", "y"), "*fp32") | {"widths": "*i32"}
        types |= dict.fromkeys(("rows", "n", "columns"), "i32") | {"stride_v_n": "i64"}
        constants |= {"stride_v_column": 1}
        aligned = ["c", "v", "y", "n", "columns", "stride_v_n"]
    else:
        types = {"x": f"*{element}", "vectors": f"*{element}", "edges": "*i32", "out": "*fp32"}
        types |= dict.fromkeys(("rows", "d", "bands"), "i32")
        types |= dict.fromkeys(("stride_row", "stride_v"), "i64")
        constants |= {"stride_feature": 1, "stride_component": 1, "UPCAST": False}
        aligned = ["x", "vectors", "d", "stride_row", "stride_v"]
    return {
        "name": f"{kernel}-{arch}-{precision}-{element}",
        "module": kernel if kernel == "band_energies" else "staircase", "kernel": kernel,
        "arch": arch, "types": types, "constants": constants, "aligned": aligned,
        "warps": b.warps, "stages": b.stages, "tensor_core": half or precision != "ieee",
        "untransposed": False,
    }  # fmt: skip


def small_jobs(arch: int) -> list[dict[str, Any]]:
    common = {"arch": arch, "warps": 8, "stages": 1, "tensor_core": False, "untransposed": False}
    partial = {
        "name": f"partial-{arch}", "module": "partial_sums", "kernel": "add_partial_sums",
        "types": {
            "partial": "*fp32", "out": "*fp32", "scale": "fp32", "values": "i32", "splits": "i32"
        },
        "constants": {"BLOCK": 1024}, "aligned": ["partial", "out", "values"],
    }  # fmt: skip
    sampled = {
        "name": f"sampled-{arch}", "module": "sampled_gradient", "kernel": "sampled_gradient",
        "types": {
            "logits": "*bf16", "counts": "*i8", "labels": "*i64", "seed": "*i64",
            "classes": "i32", "stride": "i64",
        },
        "constants": {"BLOCK": 4096}, "aligned": ["logits", "stride"],
    }  # fmt: skip
    return [{**partial, **common}, {**sampled, **common}]


def jobs() -> list[dict[str, Any]]:
    found = [job for arch in tiling.ARCHITECTURES for job in small_jobs(arch)]
    for kernel, arch, precision, two, t in tiling.table():
        if kernel == "tiles":
            for layout in ("rows", "sequences", "parts"):
                found.append(tiles_job(arch, t, layout, "bf16", split=layout == "rows"))
            found.append(tiles_job(arch, t, "rows", "fp16", split=False))
        elif kernel == "rows":
            element = ELEMENT[precision]
            for given, weights in (("index", False), ("lengths", False), ("none", True)):
                found.append(
                    rows_job(arch, precision, two, t, given=given, weights=weights, element=element)
                )
    found += [specialised(job) for job in found if job["kernel"].startswith("second_moment")]
    return found + [blocks_job(*entry) for entry in tiling.block_table()]


def specialised(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job as Triton compiles it for arguments that are 1: they become constants."""
    ones = [n for n in ("splits", "panels", "sequences", "members") if n in job["types"]]
    types = {name: kind for name, kind in job["types"].items() if name not in ones}
    constants = {**job["constants"], **dict.fromkeys(ones, 1)}
    return {**job, "name": f"{job['name']}-ones", "types": types, "constants": constants}


JOBS = jobs()


@pytest.fixture(scope="session")
def machine_code() -> dict[str, dict[str, Any]]:
    """Compile every job."""
    shares = [JOBS[i::PROCESSES] for i in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = list(pool.map(compiled, shares))
    return {
        job["name"]: found
        for share, result in zip(shares, results, strict=True)
        for job, found in zip(share, result, strict=True)
    }


def compiled(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return uninterpreted("compile_kernels.py", cache_dir() / "machine-code", given=json.dumps(jobs))


def uninterpreted(program: str, *arguments: Path, given: str = "") -> list[dict[str, Any]]:
    """Run a program in a process of its own, as the kernels of this one are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / program, *arguments],
        input=given, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["name"])
def test_the_machine_code_is_as_it_should_be(job: dict[str, Any], machine_code: Any) -> None:
    found = machine_code[job["name"]]
    assert found["spills"] == 0, found
    assert found["stack"] == 0, found
    assert found["registers"] <= 255
    # A block that does not fit is compiled to a lone trap, which needs hardly a register.
    assert found["registers"] > 16
    assert found["shared"] <= SHARED[job["arch"]], found
    assert (found["tensor_core"] > 0) == job["tensor_core"], found
    if job["untransposed"]:
        assert found["untransposed"] == found["tensor_core"], found
        assert found["bulk_loads"] > 0


# Compute capability 8.0 needs 174; loads of two bytes leave nothing to spare below 255.
GROUP_REGISTERS = 176


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_grouped_launches_are_compiled_to_copies_of_16_bytes() -> None:
    """Of the kernels the launch itself asks for: hints a hand-written signature cannot show."""
    jobs = uninterpreted("record_launches.py")
    assert {(job["arch"], job["constants"]["INDEX"]) for job in jobs} == {
        (arch, index) for arch in tiling.ARCHITECTURES for index in (False, True)
    }
    for job, found in zip(jobs, compiled(jobs), strict=True):
        said = job["name"], found
        assert found["two_byte_loads"] == found["two_byte_copies"] == 0, said
        assert found["sixteen_byte_copies"] >= 8, said
        assert found["spills"] == found["stack"] == 0, said
        assert 16 < found["registers"] <= GROUP_REGISTERS, said
        assert found["shared"] <= SHARED[job["arch"]], said
        assert found["tensor_core"] > 0, said
        assert job["arch"] != 90 or found["untransposed"] == found["tensor_core"], said


def test_every_architecture_has_every_entry() -> None:
    for arch in tiling.ARCHITECTURES:
        for precision in ELEMENT:
            for two in (False, True):
                assert tiling.chosen_rows(512, 4096, arch, precision, two).splits >= 1
        for precision in ("tf32x3", "tf32", "ieee"):
            assert tiling.staircase(arch, precision)
    assert tiling.architecture((8, 9)) == 80
    assert tiling.architecture((9, 0)) == 90
    assert tiling.architecture((12, 0)) == 100


@pytest.mark.parametrize("arch", [90, 100])
def test_small_sums_are_split_and_large_ones_are_not(arch: int) -> None:
    assert tiling.whole_rows(256, 16384, arch).splits > 1
    assert tiling.whole_rows(14336, 16384, arch).splits == 1
    assert tiling.whole_rows(256, 100, arch).splits == 1


def test_the_model_never_prefers_what_it_finds_slower() -> None:
    for d in (128, 768, 2048, 4096, 11008):
        chosen = tiling.whole_rows(d, 16384, 90)
        for paired in (False, True):
            other = Tiling(64, 8, 4, paired=paired)
            assert tiling.seconds(chosen, d, 16384, 90) <= tiling.seconds(other, d, 16384, 90)


def test_only_what_is_whole_and_of_its_key_is_taken_from_the_cache(tmp_path: Path) -> None:
    one, two, found = kernel_cache.digest(1), kernel_cache.digest(2), {"registers": 64}
    assert kernel_cache.kept(tmp_path, one) is None
    kernel_cache.keep(tmp_path, one, found)
    assert kernel_cache.kept(tmp_path, one) == found
    assert kernel_cache.kept(tmp_path, two) is None
    file = tmp_path / f"{one}.json"
    (tmp_path / f"{two}.json").write_bytes(file.read_bytes())
    assert kernel_cache.kept(tmp_path, two) is None
    file.write_text(file.read_text().replace("64", "65"))
    assert kernel_cache.kept(tmp_path, one) is None
