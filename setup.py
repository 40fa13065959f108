"""Packages, the kernels' folder, and the CMake extension; everything else is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("CURVFAST_NATIVE", "1") != "0"


class CMakeExtension(Extension):
    """An extension whose sources CMake knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Builds extensions by CMake; setuptools itself puts them where editable installs want them."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        folder = Path(self.build_temp).resolve() / ext.name
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CURVFAST_CMAKE_ARGS", "")),
        ]
        # --fresh: a cache left by an isolated build names a ninja that is no longer there.
        subprocess.run(["cmake", "--fresh", "-S", ROOT, "-B", folder, *options], check=True)
        subprocess.run(["cmake", "--build", folder, "--config", "Release"], check=True)


setup(
    packages=[*find_packages(include=["curvfast", "curvfast.*"]), "curvfast.kernels"],
    package_dir={"curvfast.kernels": "kernels/src"},
    ext_modules=[CMakeExtension("curvfast._C")] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
