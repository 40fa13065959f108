"""Compiles kernels for GPUs that are not here; run as a program, without Triton's interpreter.

Reads a list of jobs from standard input as JSON, writes what the machine code holds to standard
output, one line a job. What decides a job's machine code names what was found in it in the folder
given: it is not compiled again.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kernel_cache
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def source_of(job: dict[str, Any]) -> ASTSource:
    """Return the kernel as the job specialises it."""
    module = importlib.import_module(f"curvfast.kernels.{job['module']}")
    function = getattr(module, job["kernel"])
    names = function.arg_names
    given = dict(job["constants"])
    if "ELEMENT" in given:
        given["ELEMENT"] = getattr(tl, given["ELEMENT"])
    constants = {(names.index(key),): value for key, value in given.items()}
    signature = {**job["types"], **dict.fromkeys(job["constants"], "constexpr")}
    assert set(signature) == set(names), set(signature) ^ set(names)
    aligned = {(names.index(key),): [["tt.divisibility", 16]] for key in job["aligned"]}
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)


def key_of(job: dict[str, Any], source: ASTSource) -> str:
    """Return a name for everything that decides what is found: compiler, kernel, options, this."""
    settings = {k: v for k, v in os.environ.items() if k.startswith("TRITON_") and "DIR" not in k}
    sizes = [(TOOLS / name).stat().st_size for name in ("ptxas", "cuobjdump")]
    return kernel_cache.digest(
        triton.__version__, sizes, settings, source.hash(), job,
        Path(__file__).read_text(encoding="utf-8"),
    )  # fmt: skip


def compiled(job: dict[str, Any], source: ASTSource) -> dict[str, Any]:
    """Compile one job and count what matters in its machine code."""
    options = {"num_warps": job["warps"], "num_stages": job["stages"]}
    kernel = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = tool("-sass", file.name)
        usage = tool("-res-usage", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\bSTL\b", code)),
        "shared": kernel.metadata.shared,
        "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", code)),
        "untransposed": len(re.findall(r"HGMMA.*tnspA.*tnspB", code)),
        "bulk_loads": code.count("UTMALDG"),
        "two_byte_loads": len(re.findall(r"\bLDG\S*\.U16\b", code)),
        "two_byte_copies": len(re.findall(r"\bSTS\S*\.U16\b", code)),
        "sixteen_byte_copies": len(re.findall(r"\bLDGSTS\S*\.128\b", code)),
    }


def tool(option: str, path: str) -> str:
    done = subprocess.run(
        [TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for line in json.load(sys.stdin):
        source = source_of(line)
        key = key_of(line, source)
        found = kernel_cache.kept(folder, key)
        if found is None:
            found = compiled(line, source)
            kernel_cache.keep(folder, key, found)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
