"""Robust radii on a GPU: how long, against what, and what of that time is rat_ext's own.

    python benchmarks/gpu.py --out gpu.json              # minutes; --budget says how many seconds
    python benchmarks/gpu.py --device cpu --tiny         # the same code on a toy, in seconds

Milliseconds are medians of CUDA events, contenders side by side on one batch. The nets have random
weights, with a bias that centres the logits, so that predictions differ and flip; what a search
costs on them is told by the forward rows. Contenders:

    textbook          rat_ext.reference with regrad=True: a new gradient at each of 24 probes
    bisection         plain PyTorch on a fixed ray, without a host synchronisation, in as many steps
                      as 19 of 20 of these images need for rtol 1e-2 (which no user knows before)
    compiled, graph   the same with torch.compile, and as one CUDA graph
    rat_ext           robust_radius
    estimator         RadiusEstimator, as it runs by default
    forward, ray      one forward; one forward and backward to the input

The share of rat_ext's own kernels is that of robust_radius, of the time that the GPU is busy.
Contenders that fail are recorded with their error, and what the budget does not reach as skipped.
The JSON is written after each case.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rat_ext
from rat_ext import RadiusEstimator, models, reference, robust_radius
from rat_ext._core import core
from rat_ext.search.place import launch_arguments

RTOL = 1e-2
COMPILED = ("resnet18",)  # compiling the others takes minutes
# In order of importance: the budget may not reach the last ones.
CASES = [
    *(("resnet18", 1), ("resnet50", 256), ("resnet18", 32), ("resnet18", 256)),
    *(("resnet50", 1), ("wrn-28-10", 1), ("vit-b-16", 1), ("resnet50", 32), ("wrn-28-10", 32)),
    *(("vit-b-16", 32), ("wrn-28-10", 256), ("vit-b-16", 256)),
]


def build_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A net with random weights, and the shape of one input."""
    if name == "digits-cnn":
        return models.create(name), (1, 8, 8)
    if name == "wrn-28-10":
        return models.create(name), (3, 32, 32)
    import torchvision

    if name == "resnet18":  # for 32x32 images: a small stem, and no pooling behind it
        net = torchvision.models.resnet18(num_classes=10)
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
        return net, (3, 32, 32)
    if name == "resnet50":
        return torchvision.models.resnet50(), (3, 224, 224)
    return torchvision.models.vit_b_16(), (3, 224, 224)


class Centred(nn.Module):
    """The net with its mean logits over some inputs subtracted."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net = net.eval()
        with torch.no_grad():
            self.register_buffer("mean", net(x).mean(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.mean


# ---- Contenders in plain PyTorch -----------------------------------------------------------------


def plain_ray(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        y = logits.detach().argmax(1)
        loss = nn.functional.cross_entropy(logits, y)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.sign(), y


@torch.no_grad()
def plain_bisection(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    direction, y = plain_ray(model, x)
    lower, upper = torch.zeros_like(x[:, 0, 0, 0]), torch.ones_like(x[:, 0, 0, 0])
    for _ in range(steps):
        middle = (lower + upper) / 2
        probe = torch.addcmul(x, direction, middle[:, None, None, None]).clamp_(0, 1)
        kept = model(probe).argmax(1) == y
        lower, upper = torch.where(kept, middle, lower), torch.where(kept, upper, middle)
    return (lower + upper) / 2


def graphed_bisection(model: nn.Module, x: Tensor, steps: int) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            plain_bisection(model, x, 2)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        radii = plain_bisection(model, x, steps)

    def replay() -> Tensor:
        graph.replay()
        return radii

    return replay


# ---- Measuring -----------------------------------------------------------------------------------


def milliseconds(work: Callable[[], Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """The median over as many runs as fit into `seconds`; over one, if a run takes longer."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    work()  # warms up
    while not times or (time.perf_counter() < end and len(times) < 50):
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after))
        else:
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
    return {"ms": statistics.median(times), "runs": len(times)}


def own_share(work: Callable[[], Any], device: torch.device) -> float | None:
    """Share of the GPU's busy time that is spent in the kernels of namespace rat."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize(device)
    busy = {
        event.key: event.self_device_time_total
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
    own = sum(t for name, t in busy.items() if "rat::" in name)
    return own / sum(busy.values()) if busy else None


def perturb_bandwidth(device: torch.device, rows: int, shape: tuple[int, ...]) -> dict[str, float]:
    """Achieved GB/s of the perturb kernel, and of a copy, counting bytes read and written."""
    x = torch.rand(rows, *shape, device=device)
    direction = torch.randint(-1, 2, x.shape, dtype=torch.int8, device=device)
    index = torch.arange(rows, dtype=torch.int32, device=device)
    radii = torch.rand(rows, 1, device=device)
    out = torch.empty_like(x)
    launch = launch_arguments(device)
    perturb = partial(core.perturb, x, direction, index, radii, 0.0, 1.0, out, **launch)
    perturb_ms = milliseconds(perturb, device, 0.5)["ms"]
    copy_ms = milliseconds(lambda: out.copy_(x), device, 0.5)["ms"]
    perturb_rate = x.numel() * (4 + 1 + 4) / perturb_ms / 1e6
    copy_rate = x.numel() * (4 + 4) / copy_ms / 1e6
    return {
        "bytes": 9 * x.numel(),
        "perturb_GB_per_s": perturb_rate,
        "copy_GB_per_s": copy_rate,
        "ratio": perturb_rate / copy_rate,
    }


def steps_for(radii: Tensor) -> int:
    """Bisections of [0, 1] after which 19 of 20 of these brackets are as narrow as RTOL."""
    found = radii[radii.isfinite()].double()
    smallest = float(found.quantile(0.05)) if len(found) else 1.0
    return max(1, math.ceil(math.log2(1 / (RTOL * max(smallest, 2.0**-24)))))


def run_case(
    name: str, batch: int, device: torch.device, seconds: float, end: float
) -> dict[str, Any]:
    """Measures every contender that starts before `end`."""
    torch.manual_seed(0)
    net, shape = build_model(name)
    x = torch.rand(batch, *shape, device=device)
    model = Centred(net.to(device), torch.rand(8, *shape, device=device)).eval()
    result = robust_radius(model, x, rtol=RTOL, full=True)
    steps = steps_for(result.radius)
    estimators: dict[str, RadiusEstimator] = {}

    def estimator(key: str) -> Callable[[], Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a failed capture is a failure here
            estimators[key] = RadiusEstimator(model, x, rtol=RTOL)
        return partial(estimators[key], x)

    def compiled() -> Callable[[], Any]:
        if name not in COMPILED:
            raise NotImplementedError("not compiled: takes too long")
        return partial(plain_bisection, torch.compile(model), x, steps)

    @torch.no_grad()
    def forward() -> Tensor:
        return model(x)

    makers = {
        "forward": lambda: forward,
        "ray": lambda: partial(plain_ray, model, x),
        "rat_ext": lambda: partial(robust_radius, model, x, rtol=RTOL, full=True),
        "estimator": lambda: estimator("estimator"),
        "bisection": lambda: partial(plain_bisection, model, x, steps),
        "bisection compiled": compiled,
        "bisection graph": lambda: graphed_bisection(model, x, steps),
        "textbook": lambda: partial(reference.robust_radius, model, x, rtol=RTOL, regrad=True),
    }
    if device.type != "cuda":
        del makers["bisection graph"]
    contenders: dict[str, dict[str, Any]] = {}
    for key, make in makers.items():
        try:
            if time.perf_counter() > end:
                raise TimeoutError("out of time")
            contenders[key] = milliseconds(make(), device, seconds)
        except Exception as error:
            contenders[key] = {
                "error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            }
        if key != "estimator":
            estimators.pop(key, None)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ours = estimators.get("estimator")
    radii = ours(x).radius if ours else result.radius
    return {
        "model": name,
        "batch": batch,
        "mode": ours.mode if ours else None,
        "bisection_steps": steps,
        "forward_rows": float(result.forward_rows.double().mean()),
        "found": float(result.found.double().mean()),
        "estimator_agrees": float(
            torch.isclose(radii, result.radius, rtol=2 * RTOL).double().mean()
        ),
        "own_share": own_share(partial(robust_radius, model, x, rtol=RTOL), device),
        "contenders": contenders,
    }


def table(report: dict[str, Any]) -> str:
    """One line for each case: milliseconds, and how many times the estimator's; or the error."""
    lines = []
    for case in report["cases"]:
        times = {k: c.get("ms") for k, c in case["contenders"].items()}
        ours = times.get("estimator") or times.get("rat_ext") or math.nan
        cells = [f"{k} {t:.2f} ms ({t / ours:.2f} x)" for k, t in times.items() if t is not None]
        cells += [f"{k}: {c['error']}" for k, c in case["contenders"].items() if "error" in c]
        share = case["own_share"]
        own = "" if share is None else f"; own kernels {100 * share:.1f} %"
        lines.append(f"{case['model']}, batch {case['batch']}: {', '.join(cells)}{own}")
    if report["skipped"]:
        lines.append(f"out of time for: {', '.join(report['skipped'])}")
    if report["perturb"]:
        lines.append(f"perturb: {100 * report['perturb']['ratio']:.0f} % of the copy bandwidth")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--budget", type=float, default=600, help="seconds after which nothing starts"
    )
    parser.add_argument("--seconds", type=float, default=2, help="for each contender, at least")
    parser.add_argument("--tiny", action="store_true", help="a toy, to test this script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and (problem := rat_ext.build_info().cuda_problem):
        parser.error(f"no usable GPU: {problem}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "device_loop": hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"),
        "perturb": None,
        "cases": [],
        "skipped": [],
    }
    end = time.perf_counter() + arguments.budget
    shape = (3, 8, 8) if arguments.tiny else (3, 224, 224)
    report["perturb"] = perturb_bandwidth(device, 8 if arguments.tiny else 256, shape)
    cases = [("digits-cnn", 1), ("digits-cnn", 4)] if arguments.tiny else CASES
    for name, batch in tqdm(cases, unit="case"):
        if time.perf_counter() < end:
            report["cases"].append(run_case(name, batch, device, arguments.seconds, end))
        else:
            report["skipped"].append(f"{name}, batch {batch}")
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
