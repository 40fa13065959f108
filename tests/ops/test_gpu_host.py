"""``benchmarks/device.sh`` without a GPU: its whole host side, under the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "MAKE"))}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**kept, **environment}
    )


@pytest.mark.skipif(sys.platform != "linux", reason="GPU machines run Linux")
def test_a_dry_run_takes_every_path_and_writes_every_figure(tmp_path: Path) -> None:
    script = [str(BENCHMARKS / "device.sh"), "--dry-run", "--out", str(tmp_path)]
    done = run(script, PYTHON=sys.executable, CURVFAST_COMMIT="0123456789ab")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (ROOT / "curvfast" / "kernels").exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{part}-0123456789ab.{kind}" for part in "AB" for kind in ("json", "log")]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")]
    for each in runs:
        facts = each["environment"]
        assert facts["torch"]
        assert facts["triton"]
        assert {"gpu", "nvidia_smi", "tools", "time"} <= set(facts)
        assert facts["commit"] == "0123456789ab"
        rows = [row for value in each.values() if isinstance(value, list) for row in value]
        assert not [row for row in rows if "failed" in row or "skipped" in row]
    spec = importlib.util.spec_from_file_location("table", BENCHMARKS / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    found = table.merged(runs)
    columns = {
        "second_moment": {
            "dtype", "rows", "d", "ms", "tflops_dense_equivalent", "ratio_best_cublas",
            "fraction_of_gemm_ceiling", "error", "host_us",
        },
        "masked_second_moment": {"ms", "error"},
        "projection": {"mass", "share_of_dense", "ours", "dense_fp32", "error"},
        "band_energies": {"ours", "plain", "error"},
        "sampled_gradient": {"classes", "ours", "plain", "error"},
        "grouped_second_moments": {"layers", "ours", "cublas"},
        "packed_sum": {"d", "torch", "native"},
        "ceilings": {"copy_gigabytes_a_second", "gemm_tflops"},
        "warm": {"seconds"},
        "check": {"error"},
        "eigh": {"d", "dtype", "ms"},
        "tune": {"d", "model_ms", "ms", "rate"},
        "build": {"missing", "built"},
    }  # fmt: skip
    for case, names in columns.items():
        assert found[case], case
        assert all(names <= set(row) for row in found[case]), case
    step, driven = found["end_to_end"]
    assert {"step_ms", "collecting_step_ms", "ratio"} <= set(step)
    assert {"collect_from_ms", "tokens_a_second"} <= set(driven)
    assert found["tests"][-1]["exit_code"] == 0
    assert found["tests"][-1]["summary"] == {"passed": len(found["tests"]) - 1}
    lines = table.gpu(found).splitlines()
    assert len(lines) == 4 + len(found["second_moment"]) + len(found["projection"])
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_tuning_prints_rates_for_the_table() -> None:
    done = run([sys.executable, "benchmarks/tune.py", "--dry-run"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(90, False): " in done.stdout
    assert "(90, True): " in done.stdout


def test_without_a_gpu_and_unasked_nothing_is_measured(tmp_path: Path) -> None:
    scripts = (
        [sys.executable, str(BENCHMARKS / "gpu.py"), "ceilings"],
        [sys.executable, str(BENCHMARKS / "tune.py")],
        [str(BENCHMARKS / "device.sh"), "A", "--out", str(tmp_path)],
    )
    for script in scripts:
        # nvidia-smi is not asked which devices a process may see: it is not found.
        done = run(script, CUDA_VISIBLE_DEVICES="", PYTHON=sys.executable, PATH="/usr/bin:/bin")
        assert done.returncode == 2, script
        assert "--dry-run" in done.stderr
