"""Builds the compiled core, rat_ext._C, with CMake. The metadata is in pyproject.toml.

Environment variables:

CXX                 the C++ compiler, which is otherwise CMake's choice
RAT_EXT_CUDA        0: without CUDA; 1: with CUDA, or fail; unset: with CUDA if there is an nvcc
                    that works
RAT_EXT_CUDA_ARCHS  CUDA architectures, such as "80-real;90-real;90-virtual"
RAT_EXT_WERROR      1: compiler warnings are errors
RAT_EXT_SANITIZE    1: address and undefined-behaviour sanitizers (see scripts/sanitize.sh)
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_HOME = "/usr/local/cuda"


def flag(env: Mapping[str, str], name: str) -> bool | None:
    """The switch `name`: True for 1, False for 0, None if unset."""
    value = env.get(name, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{name} is {value!r}; set it to 0 or 1, or leave it unset")
    return value == "1" if value else None


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """nvcc as $CUDACXX names it, or on PATH, in $CUDA_HOME, $CUDA_PATH or /usr/local/cuda."""
    homes = [env.get("CUDA_HOME"), env.get("CUDA_PATH"), DEFAULT_CUDA_HOME]
    bins = [str(Path(home, "bin")) for home in homes if home]
    path = os.pathsep.join([env.get("PATH", os.defpath), *bins])
    return shutil.which(env.get("CUDACXX") or "nvcc", path=path)


def cuda_options(env: Mapping[str, str]) -> list[str]:
    """The CMake options that choose CUDA. Raises SetupError if it is required and not there."""
    wanted = flag(env, "RAT_EXT_CUDA")
    if wanted is False:
        return ["-DRAT_EXT_CUDA=OFF"]
    if wanted and find_nvcc(env) is None:
        raise SetupError(
            "RAT_EXT_CUDA=1 asks for a CUDA build, but nvcc was not found on PATH, in $CUDACXX, "
            f"$CUDA_HOME, $CUDA_PATH or {DEFAULT_CUDA_HOME}. Install the CUDA toolkit or point "
            "CUDA_HOME at it; or unset RAT_EXT_CUDA to build for the CPU only."
        )
    return [
        f"-DRAT_EXT_CUDA={'ON' if wanted else 'AUTO'}",
        f"-DRAT_EXT_CUDA_ARCHS={env.get('RAT_EXT_CUDA_ARCHS', '')}",
    ]


def require_compiler(env: Mapping[str, str]) -> None:
    """Raises SetupError if CMake would find no C++ compiler: its own log hides that well."""
    if sys.platform == "win32":
        return  # its compiler is not on PATH; CMake asks the installer of Visual Studio
    names = shlex.split(env.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name, path=env.get("PATH", os.defpath)) for name in names):
        raise SetupError(
            f"No C++ compiler was found (looked for {', '.join(names)}). Install one (`apt install "
            "g++` on Debian and Ubuntu, `dnf install gcc-c++` on Fedora, `xcode-select --install` "
            "on macOS), or name yours in CXX."
        )


def find_tool(name: str) -> str:
    """A build tool on PATH or beside this Python, whose environment need not be activated."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SetupError(
            f"{name} was not found. Install without --no-build-isolation, or first "
            "`pip install setuptools cmake ninja pybind11`."
        )
    return tool


class Build(build):
    def run(self) -> None:
        # setuptools packs everything in here, also what an earlier build left.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildCore(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise SetupError(
                "pybind11 was not found. Install without --no-build-isolation, or first "
                "`pip install setuptools cmake ninja pybind11`."
            ) from error
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise SetupError(
                f"The headers of {sys.executable} are missing: install them (python3-dev on Debian "
                "and Ubuntu, python3-devel on Fedora)."
            )
        require_compiler(os.environ)
        sanitize = flag(os.environ, "RAT_EXT_SANITIZE")
        werror = flag(os.environ, "RAT_EXT_WERROR")
        build_type = "Debug" if sanitize else "Release"
        options = [
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DRAT_EXT_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DRAT_EXT_WERROR={'ON' if werror else 'OFF'}",
            *cuda_options(os.environ),
        ]
        nvcc = find_nvcc(os.environ)
        if nvcc:
            os.environ["CUDACXX"] = nvcc  # where CMake looks first
        # A build directory keeps its first compilers and flags, so each set of them has its own.
        names = ("CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
        compilers = [os.environ.get(name) for name in names]
        key = zlib.crc32(repr((options, compilers)).encode())
        directory = Path(self.build_temp, f"{key:08x}").resolve()
        cmake = find_tool("cmake")
        # On Windows CMake's own choice, Visual Studio: Ninja takes a compiler from PATH only.
        generator = []
        if sys.platform != "win32":
            generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
        self.spawn(
            [
                cmake,
                f"-S{ROOT}",
                f"-B{directory}",
                *generator,
                "-DPYBIND11_FINDPYTHON=ON",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DRAT_EXT_VERSION={self.distribution.get_version()}",
                *options,
            ]
        )
        self.spawn([cmake, "--build", str(directory), "--config", build_type])
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        place = ["--prefix", str(target.parent), "--config", build_type]
        self.spawn([cmake, "--install", str(directory), *place])


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("rat_ext._C", sources=[])],
        cmdclass={"build": Build, "build_ext": BuildCore},
    )
