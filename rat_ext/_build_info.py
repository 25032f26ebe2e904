"""What was built, and what of it works with this machine's torch and GPUs."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

import torch

from ._core import __version__, core


@dataclass(frozen=True)
class BuildInfo:
    """What was built, and what of it works with this machine's torch and GPUs.

    `cuda` is the CUDA version of the compiler; None for a CPU build, and `cuda_reason` says why it
    is one. `cuda_archs` names machine code (`sm_90`) and PTX (`compute_90`) as torch does.
    `devices` are the GPUs that torch sees, and `device_problems` says of each why the CUDA kernels
    cannot run on it; None if they can. `cuda_problem` is None if they can on one of them.
    """

    version: str
    compiler: str
    build_type: str
    cuda: str | None
    cuda_reason: str | None
    cuda_archs: tuple[str, ...]
    torch: str
    torch_cuda: str | None
    devices: tuple[str, ...]
    device_problems: tuple[str | None, ...]
    cuda_problem: str | None

    @property
    def cuda_usable(self) -> bool:
        return self.cuda_problem is None


def build_info() -> BuildInfo:
    """What was built into rat_ext, and whether its CUDA kernels can run on this machine's GPUs."""
    cuda = core.BUILD_CUDA_VERSION or None
    archs = tuple(core.BUILD_CUDA_ARCHS.split())
    devices = []
    # A ROCm build of torch also calls its devices "cuda".
    if torch.version.cuda is not None and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    problem: str | None
    problems: list[str | None] = []
    if cuda is None:
        problem = "the core was built without CUDA"
    elif torch.version.cuda is None:
        problem = "this torch was built without CUDA"
    elif not devices:
        problem = "torch sees no GPU"
    else:
        driver = _driver_version()
        problems = [
            _device_problem(device.name, (device.major, device.minor), archs, _number(cuda), driver)
            for device in devices
        ]
        problem = None if None in problems else problems[0]
    return BuildInfo(
        version=__version__,
        compiler=core.BUILD_COMPILER,
        build_type=core.BUILD_TYPE,
        cuda=cuda,
        cuda_reason=core.BUILD_CUDA_REASON or None,
        cuda_archs=archs,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        devices=tuple(f"{device.name} (sm_{device.major}{device.minor})" for device in devices),
        device_problems=tuple(problems) or (problem,) * len(devices),
        cuda_problem=problem,
    )


def format_build_info(info: BuildInfo | None = None) -> str:
    """`build_info()` as lines of text, for `rat-ext info` and bug reports."""
    info = info or build_info()
    archs = ", ".join(info.cuda_archs)
    gpus = [
        f"{device}{f': not usable, {problem}' if problem else ''}"
        for device, problem in zip(info.devices, info.device_problems, strict=True)
    ]
    return "\n".join(
        [
            f"rat_ext     {info.version}",
            f"core        {info.compiler}, {info.build_type}",
            f"core CUDA   {f'{info.cuda} for {archs}' if info.cuda else f'no: {info.cuda_reason}'}",
            f"torch       {info.torch} (CUDA: {info.torch_cuda or 'no'})",
            f"GPUs        {'; '.join(gpus) or 'none'}",
            f"usable      {'CPU, CUDA' if info.cuda_usable else f'CPU ({info.cuda_problem})'}",
        ]
    )


def _number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _driver_version() -> tuple[int, int]:
    """The newest CUDA version that the NVIDIA driver supports."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _device_problem(
    name: str,
    capability: tuple[int, int],
    archs: tuple[str, ...],
    cuda: tuple[int, int],
    driver: tuple[int, int],
) -> str | None:
    """Why kernels built by CUDA `cuda` for `archs` cannot run on this GPU; None if they can."""
    if driver[0] < cuda[0]:
        return (
            f"the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}, rat_ext was built with CUDA "
            f"{cuda[0]}.{cuda[1]}; update the driver, or rebuild with an older nvcc"
        )
    if any(_runs(arch, capability) for arch in archs if arch.startswith("sm_")):
        return None
    if any(_runs(arch, capability) for arch in archs if arch.startswith("compute_")):
        if driver >= cuda:
            return None
        return (
            f"{name} needs PTX of CUDA {cuda[0]}.{cuda[1]}, newer than the driver's CUDA "
            f"{driver[0]}.{driver[1]}; update the driver"
        )
    number = f"{capability[0]}{capability[1]}"
    return (
        f"{name} is sm_{number}, which is not among {', '.join(archs)}; "
        f"rebuild with RAT_EXT_CUDA_ARCHS={number}"
    )


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    # https://docs.nvidia.com/cuda/cuda-programming-guide, "Compute capabilities and compatibility":
    # machine code runs on the same major version from its minor version on, PTX on everything
    # newer; with the suffix "a" either runs on that version only, with "f" on that major version.
    parts = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch)
    assert parts, arch
    kind, number, suffix = parts.groups()
    built = divmod(int(number), 10)
    if suffix == "a":
        return capability == built
    if kind == "compute" and not suffix:
        return capability >= built
    return capability[0] == built[0] and capability >= built
