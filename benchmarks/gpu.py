"""Tests and benchmarks on a GPU, in one go, fetching nothing: ``make gpu``.

    python benchmarks/gpu.py                 everything, within eight minutes
    python benchmarks/gpu.py --dry-run       the whole host side, small, under Triton's interpreter
    python benchmarks/gpu.py --only eigh     some benchmarks

Results go to benchmarks/results/<gpu>/<commit>.json, written after every row: a run that is cut
short keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 420


def main() -> int:
    options = _options()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CURVFAST_BACKEND"] = "triton"
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here: pass --dry-run to exercise the host side\n")
        return 2
    started = time.perf_counter()
    results: dict[str, Any] = {"environment": _environment(), "dry_run": options.dry_run}
    path = options.out / f"{results['environment']['commit'][:12]}.json"
    if not options.only:
        results["tests"] = _tests(options.dry_run)
        results["sanitizer"] = _sanitizer(options.dry_run)
    from gpu_cases import CASES

    for name in options.only or CASES:
        rows = results.setdefault(name, [])
        if time.perf_counter() - started > options.seconds:
            rows.append({"skipped": f"the {options.seconds} seconds were used up"})
            continue
        try:
            for row in CASES[name]():
                rows.append(row)
                sys.stdout.write(f"{name} {json.dumps(row)}\n")
                sys.stdout.flush()
                _write(path, results)
                if time.perf_counter() - started > options.seconds:
                    rows.append({"cut_short": f"the {options.seconds} seconds were used up"})
                    break
        except Exception as error:
            # One failing case must not take the others' figures with it.
            rows.append({"failed": f"{type(error).__name__}: {error}"[:2000]})
            sys.stdout.write(f"{name} FAILED {error}\n")
        _write(path, results)
    failed = [name for name in CASES if any("failed" in row for row in results.get(name, []))]
    tests = results.get("tests", {})
    sys.stdout.write(f"wrote {path}; tests: {tests.get('summary', 'not run')}; failed: {failed}\n")
    return 1 if failed or tests.get("exit_code") else 0


def _options() -> argparse.Namespace:
    from_cases = "names of cases in gpu_cases.py"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="interpret, small sizes")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=from_cases)
    parser.add_argument("--out", type=Path, help="folder for the JSON (benchmarks/results/<gpu>)")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="stop after (420)")
    options = parser.parse_args()
    if options.out is None:
        options.out = ROOT / "benchmarks" / "results" / ("dry-run" if options.dry_run else _gpu())
    return options


def _gpu() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _environment() -> dict[str, Any]:
    import platform

    import torch
    import triton

    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": _gpu(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "commit": _said(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or "unknown",
    }  # fmt: skip
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv"]
    return {**facts, "nvidia_smi": _said(query)}


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _pytest(*arguments: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
    command = [
        *before, sys.executable, "-m", "pytest", "-q", "-o", "addopts=",
        "--import-mode=importlib", "-p", "no:cacheprovider", *arguments,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("CURVFAST_BACKEND", None)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def _tests(dry_run: bool) -> dict[str, Any]:
    code, text = _pytest("tests/ops/test_gpu.py", *(["-k", "two_sums"] if dry_run else []))
    lines = text.strip().splitlines()
    if code:
        sys.stdout.write(text[-6000:] + "\n")
    return {"exit_code": code, "summary": lines[-1] if lines else "", "failures": [
        line for line in lines if line.startswith("FAILED")
    ]}  # fmt: skip


def _sanitizer(dry_run: bool) -> str:
    """Run a few small tests under compute-sanitizer, where there is one."""
    tool = shutil.which("compute-sanitizer")
    if dry_run or tool is None:
        return "not run: no compute-sanitizer here" if tool is None else "not run: dry run"
    before = (tool, "--error-exitcode", "9")
    some = "two_sums and bfloat16 or copies and (33 or 200)"
    code, text = _pytest("tests/ops/test_gpu.py", "-k", some, before=before)
    return "clean" if code == 0 else f"exit code {code}: {text[-1500:]}"


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
