"""``make gpu`` without a GPU: its whole host side, under the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "MAKE"))}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**kept, **environment}
    )


def test_a_dry_run_takes_every_path_and_writes_every_figure(tmp_path: Path) -> None:
    arguments = f"GPU_ARGS=--out {tmp_path}"
    done = run(["make", "gpu", "--dry-run", f"GPU_PYTHON={sys.executable}", arguments])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (ROOT / "curvfast" / "kernels").exists()
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["tests"]["exit_code"] == 0
    columns = {
        "second_moment": {
            "dtype", "rows", "d", "ms", "tflops_dense_equivalent", "ratio_best_cublas",
            "fraction_of_gemm_ceiling", "error",
        },
        "projection": {"mass", "share_of_dense", "ours", "dense_fp32", "error"},
        "band_energies": {"ours", "plain"},
        "sampled_gradient": {"classes", "ours", "plain"},
        "grouped_second_moments": {"layers", "ours", "cublas"},
        "packed_sum": {"d", "torch", "native"},
        "collect_overhead": {"step_ms", "collecting_step_ms", "collect_from_ms"},
        "eigh": {"d", "dtype", "ms"},
    }  # fmt: skip
    for case, names in columns.items():
        assert found[case], case
        assert all(names <= set(row) for row in found[case]), case
    assert found["environment"]["triton"]
    spec = importlib.util.spec_from_file_location("table", BENCHMARKS / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    lines = table.gpu(found).splitlines()
    assert len(lines) == 4 + len(found["second_moment"]) + len(found["projection"])
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_tuning_prints_rates_for_the_table() -> None:
    done = run([sys.executable, "benchmarks/tune.py", "--dry-run"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(90, False): " in done.stdout
    assert "(90, True): " in done.stdout


def test_without_a_gpu_and_unasked_nothing_is_measured() -> None:
    for script in ("gpu.py", "tune.py"):
        done = run([sys.executable, str(BENCHMARKS / script)], CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 2
        assert "--dry-run" in done.stderr
