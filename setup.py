"""Packages, the kernels' folder, and the CMake extension; everything else is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("CURVFAST_NATIVE", "1") != "0"
CUDA = os.environ.get("CURVFAST_CUDA", "AUTO")


class CMakeExtension(Extension):
    """An extension whose sources CMake knows, under its own name as a target."""

    def __init__(self, name: str, *, optional: bool = False) -> None:
        super().__init__(name, sources=[], optional=optional)


class CMakeBuild(build_ext):
    """Builds extensions by CMake; setuptools itself puts them where editable installs want them."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve() / "cmake"
        if ext is self.extensions[0]:
            self._configure(ext, folder)
        target = ext.name.rpartition(".")[2]
        jobs = str(os.cpu_count() or 1)
        command = ["cmake", "--build", folder, "--config", "Release", "--parallel", jobs]
        try:
            subprocess.run([*command, "--target", target], check=True)
        except subprocess.CalledProcessError as error:
            # The one error after which setuptools goes on without an optional extension.
            raise CompileError(f"CMake could not build {ext.name}") from error

    def _configure(self, ext: Extension, folder: Path) -> None:
        import pybind11

        place = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={place}",
            f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={place}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCURVFAST_CUDA={CUDA}",
            *shlex.split(os.environ.get("CURVFAST_CMAKE_ARGS", "")),
        ]
        # --fresh: a cache left by an isolated build names a ninja that is no longer there.
        subprocess.run(["cmake", "--fresh", "-S", ROOT, "-B", folder, *options], check=True)


EXTENSIONS = [
    CMakeExtension("curvfast._C"),
    CMakeExtension("curvfast._cuda", optional=CUDA != "ON"),
]

setup(
    packages=[*find_packages(include=["curvfast", "curvfast.*"]), "curvfast.kernels"],
    package_dir={"curvfast.kernels": "kernels/src"},
    ext_modules=EXTENSIONS if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
