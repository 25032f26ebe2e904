"""The installation: what is packed, what the core links, and what a broken one says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
import torch
from elftools.elf.elffile import ELFFile
from setuptools.errors import SetupError

import rat_ext
from rat_ext import _build_info, _core

ROOT = Path(__file__).resolve().parents[1]
CORE = f"_C{EXTENSION_SUFFIXES[0]}"


def run_python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` outside the source tree, in `cwd`, which is also first on the import path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, on a machine without a CUDA toolkit in the usual place."""
    spec = importlib.util.spec_from_file_location("rat_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEFAULT_CUDA_HOME", str(tmp_path / "no-cuda"))
    return module


@pytest.fixture
def installed() -> Distribution:
    """The installed distribution, for the tests of what was packed."""
    try:
        found = distribution("rat-ext")
    except PackageNotFoundError:
        pytest.skip("rat-ext is not installed (run `make test`)")
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("rat-ext is an editable install, which packs nothing (run `make test`)")
    return found


# --- What is packed -------------------------------------------------------------------------------


def test_wheel_holds_the_package_and_nothing_else(installed: Distribution) -> None:
    files = {path.as_posix() for path in installed.files if "__pycache__" not in path.parts}
    packed = {name for name in files if not re.match(r"rat_ext-[^/]+\.dist-info/", name)}
    kinds = ("*.py", "*.html", "py.typed")
    paths = [path for kind in kinds for path in (ROOT / "rat_ext").rglob(kind)]
    sources = {path.relative_to(ROOT).as_posix() for path in paths}
    scripts = {name for name in packed if name.endswith("bin/rat-ext")}
    assert packed == {*sources, f"rat_ext/{CORE}", *scripts}
    assert len(scripts) == 1
    assert any(name.endswith("/licenses/LICENSE") for name in files)


def test_version_is_that_of_the_distribution(installed: Distribution) -> None:
    assert _core.__version__ == installed.version


def test_sdist_holds_what_the_build_needs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"]
    subprocess.run(
        [*build, "--outdir", tmp_path, ROOT], cwd=tmp_path, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("rat_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    top = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "Makefile"}
    folders = [ROOT / "csrc", ROOT / "examples", ROOT / "rat_ext"]
    kinds = {".h", ".cpp", ".cu", ".cuh", ".py", ".typed", ".html"}
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds]
    assert top | {path.relative_to(ROOT).as_posix() for path in files} <= names
    litter = re.compile(r"\.(so|pyc|o)$|^(build|dist|\.venv|\.git)/|__pycache__")
    assert not [name for name in names if litter.search(name)]


# --- What the core links --------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_core_links_no_torch_and_no_shared_cudart() -> None:
    with open(_core.core.__file__, "rb") as file:
        elf = ELFFile(file)
        tags = list(elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"))
        needed = {tag.needed for tag in tags}
        symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    assert any(name.startswith("libc.") for name in needed)
    assert not [name for name in needed if re.match("lib(torch|c10|cu|python)", name)]
    # The static cudart must not mix with the one that torch loads, in either direction.
    names = {symbol.name for symbol in symbols}
    assert "PyInit__C" in names
    assert not [name for name in names if re.match("_*cuda", name)]


def test_import_loads_no_heavy_module(tmp_path: Path) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import rat_ext; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert "rat_ext" in imported
    heavy = {"matplotlib", "sklearn", "scipy", "pandas", "torchvision", "PIL"}
    heavy |= {"foolbox", "torchattacks", "fastapi", "uvicorn", "prometheus_client"}
    assert not imported & heavy


# --- What a missing or broken core says -----------------------------------------------------------


def test_broken_core_is_an_error_that_says_how_to_rebuild(tmp_path: Path) -> None:
    package = tmp_path / "rat_ext"
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(Path(rat_ext.__file__).parent, package, ignore=ignore)
    (package / CORE).write_bytes(b"not a shared library" * 10)
    result = run_python("import rat_ext", tmp_path, PYTHONPATH="")
    assert result.returncode == 1
    message = result.stderr[result.stderr.rindex("ImportError: ") :]
    assert f"The compiled core of rat_ext in {package} does not load." in message
    assert "`pip install --force-reinstall --no-deps .`" in message
    assert f"The cause was: {package / CORE}: invalid ELF header" in message


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "The compiled core of rat_ext is missing from "),
        (["rat_ext/_C.cpython-27.so"], "holds _C.cpython-27.so; this Python loads " + CORE),
        (["setup.py", "csrc/bindings/module.cpp"], "rat_ext was imported from its source tree, "),
    ],
    ids=["missing", "another Python", "source tree"],
)
def test_missing_core_is_explained(tmp_path: Path, files: list[str], expected: str) -> None:
    for name in [*files, "rat_ext/__init__.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copy(_core.__file__, tmp_path / "rat_ext")
    result = run_python("import rat_ext._core", tmp_path, PYTHONPATH="")
    assert result.returncode == 1
    message = result.stderr[result.stderr.rindex("ImportError: ") :]
    assert expected in message
    assert "`pip install " in message
    assert "The cause was: No module named 'rat_ext._C'" in message


# --- What a build without its tools says ----------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Visual Studio is not looked for on PATH")
@pytest.mark.parametrize(
    ("tools", "missing"),
    [
        ((), "No C++ compiler was found (looked for c++, g++, clang++). Install one (`apt install"),
        (("c++",), "cmake was not found. Install without --no-build-isolation, or first `pip"),
        (("c++", "cmake"), "ninja was not found. Install without --no-build-isolation, or first"),
    ],
    ids=["compiler", "cmake", "ninja"],
)
def test_missing_build_tool_is_one_line(
    tmp_path: Path, tools: tuple[str, ...], missing: str
) -> None:
    for name in tools:
        (tmp_path / name).touch(mode=0o755)
    # The folder of this Python, whose environment may have the tools, holds none either.
    code = (
        "import runpy, sys, sysconfig; get_path = sysconfig.get_path; scripts = sys.argv.pop(1); "
        "sysconfig.get_path = lambda name: scripts if name == 'scripts' else get_path(name); "
        "sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    )
    build = ["build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, *build],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "RAT_EXT_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {missing}")
    assert "CMake Error" not in done.stdout + done.stderr


def test_compiler_named_in_cxx_must_be_there(setup_script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "my-c++").touch(mode=0o755)
    setup_script.require_compiler({"PATH": str(tmp_path), "CXX": "my-c++ -m64"})
    with pytest.raises(SetupError, match=r"looked for other-c\+\+"):
        setup_script.require_compiler({"PATH": str(tmp_path), "CXX": "other-c++"})


# --- What is published ----------------------------------------------------------------------------


def test_published_versions_are_tested() -> None:
    """The oldest and newest Python, and the oldest torch, of the metadata are those of CI."""
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ci = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', metadata)
    built = re.search(r'^build = "(cp3.*)"$', metadata, re.MULTILINE)[1]
    assert built.split() == [f"cp{python.replace('.', '')}-*" for python in pythons]
    assert f'requires-python = ">={pythons[0]}"' in metadata
    oldest_torch = re.search(r'"torch>=([\d.]+)"', metadata)[1]
    assert f'{{python: "{pythons[0]}", torch: "torch=={oldest_torch}.*"}}' in ci
    assert f'{{python: "{pythons[-1]}", torch: "torch"}}' in ci


def test_wheels_are_tried_by_a_search(tmp_path: Path) -> None:
    code = f"import runpy; runpy.run_path({str(ROOT / 'scripts/try_install.py')!r})['main']"
    cuda = _build_info.build_info().cuda is not None
    result = run_python(f"{code}({['--cuda'] if cuda else []})", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "finds the radii" in result.stdout
    result = run_python(f"{code}({[] if cuda else ['--cuda']})", tmp_path)
    assert result.returncode == 1
    assert "CUDA in the core: " in result.stderr


# --- What was built -------------------------------------------------------------------------------


def test_build_info_is_consistent() -> None:
    info = _build_info.build_info()
    assert (info.cuda is None) == (info.cuda_archs == ()) == (info.cuda_reason is not None)
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", arch) for arch in info.cuda_archs)
    assert info.torch == torch.__version__
    assert len(info.devices) == (torch.cuda.device_count() if torch.version.cuda else 0)
    if info.cuda is None or not info.devices:
        assert not info.cuda_usable
    text = _build_info.format_build_info(info)
    for part in (info.version, info.compiler, info.build_type, info.torch, *info.devices):
        assert part in text
    assert (info.cuda or info.cuda_reason) in text
    if not info.cuda_usable:
        assert info.cuda_problem in text


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_80 compute_80", (9, 0), True),
        ("compute_90", (8, 0), False),
        ("sm_90a compute_90a", (9, 0), True),
        ("sm_90a compute_90a", (10, 0), False),
        ("sm_100f", (10, 3), True),
        ("sm_100f compute_100f", (12, 0), False),
        ("sm_80 sm_90 sm_100 compute_100", (12, 0), True),
    ],
)
def test_architectures_cover_a_gpu(archs: str, capability: tuple[int, int], runs: bool) -> None:
    problem = _build_info._device_problem("GPU", capability, tuple(archs.split()), (13, 0), (13, 0))
    if runs:
        assert problem is None
    else:
        major, minor = capability
        assert f"GPU is sm_{major}{minor}" in problem
        assert f"RAT_EXT_CUDA_ARCHS={major}{minor}" in problem


def test_driver_must_know_the_cuda_version() -> None:
    def problem(capability: tuple[int, int], driver: tuple[int, int]) -> str | None:
        archs = ("sm_80", "compute_90")
        return _build_info._device_problem("GPU", capability, archs, (12, 8), driver)

    assert "driver supports CUDA 11.8" in problem((8, 0), driver=(11, 8))
    assert problem((8, 0), driver=(12, 2)) is None  # machine code runs within a major version
    assert "needs PTX of CUDA 12.8" in problem((9, 0), driver=(12, 2))
    assert problem((9, 0), driver=(12, 8)) is None


# --- How setup.py chooses CUDA --------------------------------------------------------------------


def test_cuda_required_without_nvcc_is_an_error(setup_script: ModuleType, tmp_path: Path) -> None:
    env = {"RAT_EXT_CUDA": "1", "PATH": str(tmp_path)}
    with pytest.raises(SetupError, match=r"RAT_EXT_CUDA=1 .* nvcc was not found .* CUDA_HOME"):
        setup_script.cuda_options(env)
    assert "-DRAT_EXT_CUDA=AUTO" in setup_script.cuda_options({"PATH": str(tmp_path)})


@pytest.mark.parametrize("where", ["PATH", "CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_found(setup_script: ModuleType, tmp_path: Path, where: str) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    value = {"PATH": nvcc.parent, "CUDACXX": nvcc}.get(where, tmp_path)
    env = {"RAT_EXT_CUDA": "1", "PATH": "", where: str(value)}
    assert setup_script.find_nvcc(env) == str(nvcc)
    assert "-DRAT_EXT_CUDA=ON" in setup_script.cuda_options(env)


def test_cuda_switch_must_be_0_or_1(setup_script: ModuleType) -> None:
    assert setup_script.cuda_options({"RAT_EXT_CUDA": "0"}) == ["-DRAT_EXT_CUDA=OFF"]
    with pytest.raises(SetupError, match="RAT_EXT_CUDA is 'yes'; set it to 0 or 1"):
        setup_script.cuda_options({"RAT_EXT_CUDA": "yes"})
