"""The build whose operations are the CUDA kernels' bodies, run on the CPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from rat_ext import _build_info

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def on_host() -> ModuleType:
    """The core with the CUDA kernels' bodies in place of the CPU's loops."""
    pybind11 = pytest.importorskip("pybind11", reason="building the host build needs pybind11")
    # The tools may be beside a Python whose environment is not activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None:
        pytest.skip("building the host build needs cmake and ninja")
    sanitize = "sanitizers" in _build_info.build_info().build_type
    name = "on-host-sanitized" if sanitize else "on-host"
    build = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"
    options = ["-DRAT_EXT_CUDA=OFF", "-DRAT_EXT_KERNELS_ON_HOST=ON", "-DRAT_EXT_WERROR=ON"]
    options.append(f"-DRAT_EXT_SANITIZE={'ON' if sanitize else 'OFF'}")
    python = [f"-DPython_EXECUTABLE={sys.executable}", "-DPYBIND11_FINDPYTHON=ON"]
    pybind = f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"
    configure = [cmake, f"-S{ROOT}", f"-B{build}", "-GNinja", *options, *python, pybind]
    for command in (configure, [cmake, "--build", build, "--target", "_on_host"]):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (library,) = build.glob("_on_host*.so")
    spec = importlib.util.spec_from_file_location("_on_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def core(on_host: ModuleType) -> ModuleType:
    """In place of the CPU's core, for the tests that are taken over from test_core."""
    return on_host
