"""Robust radii on a GPU: how long, against what, and what of that time is rat_ext's own.

    python benchmarks/gpu.py --out gpu.json              # the cases that matter most, those first
    python benchmarks/gpu.py --more --out more.json      # the others
    python benchmarks/gpu.py --device cpu --tiny         # the same code on a toy, in seconds

Milliseconds are medians over searches run back to back, so many between two CUDA events that their
overhead does not count. The nets have random weights, with a bias that centres the logits, so that
predictions differ and flip; what a search costs on them is told by the forward rows. Contenders:

    floor           what no search can do without: a forward and backward, and two more forwards
    model           the calls of the model that robust_radius made, alone
    robust_radius   the function: eager
    replay loop     RadiusEstimator in this mode
    device loop     likewise; from torch 2.14 on
    bisection       plain PyTorch on a fixed ray, without a host synchronisation, in as many steps
                    as 19 of 20 of these images need for rtol 1e-2 (which no user knows before)
    textbook        rat_ext.reference with regrad=True: a new gradient at each of 24 probes

Of floor and model, those with "graph" are one CUDA graph. Where the case says "compiled", all
contenders get the model from torch.compile. `outside` is the share of a search's time that is not
the model's: one minus the time of its calls alone, run as the search runs them. `own` is the share
of the GPU's busy time that is spent in rat_ext's kernels.

Contenders that fail are recorded with their error and end the run with 1; those that torch does not
have, or that the budget does not reach, are recorded as well. The JSON is written after each case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import rat_ext
from rat_ext import RadiusEstimator, models, reference, robust_radius
from rat_ext._common.user_model import full_float32
from rat_ext._core import core
from rat_ext.radius import graphs
from rat_ext.search.place import launch_arguments

RTOL = 1e-2
LOOPS = {"replay loop": graphs.ReplayLoop, "device loop": graphs.DeviceLoop}
MODEL_ALONE = {"robust_radius": "model", **dict.fromkeys(LOOPS, "model graph")}
TIMES_TEXTBOOK = {1: 40, 256: 14}  # targets, by the batch
MOST_OUTSIDE = {256: 0.01}


class Case(NamedTuple):
    model: str
    batch: int
    tf32: bool = False
    channels_last: bool = False
    compiled: str | None = None  # the backend of torch.compile

    def __str__(self) -> str:
        options = [
            "TF32" if self.tf32 else "float32",
            *(["channels_last"] if self.channels_last else []),
            *(["compiled"] if self.compiled else []),
        ]
        return f"{self.model}, batch {self.batch}, {', '.join(options)}"


# In order of importance: the budget may not reach the last ones.
CASES = [
    Case("resnet18", 1),
    Case("resnet50", 256),
    Case("resnet50", 256, tf32=True),
    Case("resnet18", 1, tf32=True),
    Case("resnet50", 256, tf32=True, channels_last=True),
    Case("resnet18", 1, tf32=True, channels_last=True),
    Case("resnet18", 1, tf32=True, compiled="inductor"),
]
MORE = [
    Case("resnet50", 256, tf32=True, compiled="inductor"),
    *(Case(name, 32, tf32=True) for name in ("resnet18", "resnet50", "wrn-28-10", "vit-b-16")),
    *(Case(name, 1, tf32=True) for name in ("resnet50", "wrn-28-10", "vit-b-16")),
    *(Case(name, 256, tf32=True) for name in ("resnet18", "wrn-28-10", "vit-b-16")),
]
TINY = [
    Case("digits-cnn", 1),
    Case("digits-cnn", 4, tf32=True, channels_last=True, compiled="eager"),
]


def build_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A net with random weights, and the shape of one input."""
    if name == "digits-cnn":
        return models.create(name), (1, 8, 8)
    if name in ("resnet18", "wrn-28-10"):
        return models.create(name), (3, 32, 32)
    import torchvision

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


# ---- Contenders ----------------------------------------------------------------------------------


def call_model(model: nn.Module, x: Tensor, seed: Tensor, sizes: Sequence[int]) -> None:
    """A forward of x and a backward to it, then a forward of each of the sizes."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
    torch.autograd.grad(logits, leaf, seed)
    with torch.no_grad():
        for rows in sizes:
            model(x[:rows])


@torch.no_grad()
def plain_bisection(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        y = logits.detach().argmax(1)
        loss = nn.functional.cross_entropy(logits, y)
    direction = torch.autograd.grad(loss, leaf)[0].sign()
    lower, upper = torch.zeros_like(x[:, 0, 0, 0]), torch.ones_like(x[:, 0, 0, 0])
    for _ in range(steps):
        middle = (lower + upper) / 2
        probe = torch.addcmul(x, direction, middle[:, None, None, None]).clamp_(0, 1)
        kept = model(probe).argmax(1) == y
        lower, upper = torch.where(kept, middle, lower), torch.where(kept, upper, middle)
    return (lower + upper) / 2


def steps_for(radii: Tensor) -> int:
    """Bisections of [0, 1] after which 19 of 20 of these brackets are as narrow as RTOL."""
    found = radii[radii.isfinite()].double()
    smallest = float(found.quantile(0.05)) if len(found) else 1.0
    return max(1, math.ceil(math.log2(1 / (RTOL * max(smallest, 2.0**-24)))))


def captured(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The work as one CUDA graph, recorded as the estimator records its own."""
    recorder = graphs.graphs_for(device)
    if recorder is None:
        raise NotImplementedError(f"no CUDA graphs on {device.type}")
    return recorder.capture(work)


def estimator_in(mode: str, model: nn.Module, x: Tensor) -> Callable[[], Any]:
    if graphs.graphs_for(x.device) is None:
        raise NotImplementedError(f"no CUDA graphs on {x.device.type}")
    if mode == "device loop" and not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"):
        raise NotImplementedError(f"torch {torch.__version__} cannot capture a loop on the device")
    with (
        mock.patch.multiple(graphs, ReplayLoop=LOOPS[mode], DeviceLoop=LOOPS[mode]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", RuntimeWarning)  # says why it cannot be captured
        return partial(RadiusEstimator(model, x, rtol=RTOL), x)


# ---- Measuring -----------------------------------------------------------------------------------


def elapsed(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Milliseconds of each of so many runs back to back."""
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    total = 1e3 * (time.perf_counter() - start)
    if device.type == "cuda":
        after.record()
        after.synchronize()
        total = before.elapsed_time(after)
    return total / repeats


def milliseconds(work: Callable[[], Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """The median of what takes about `seconds`, and longer if a run does."""
    elapsed(work, 1, device)  # warms up
    once = elapsed(work, 1, device)
    repeats = max(1, math.ceil(1e3 * seconds / 20 / max(once, 1e-6)))
    times = [once] if repeats == 1 else []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(elapsed(work, repeats, device))
    return {"ms": statistics.median(times), "runs": repeats * len(times)}


def count(events: Iterable[Any]) -> dict[str, Any]:
    """Launches, host synchronisations and the share of rat_ext's kernels in a profile."""
    launches = syncs = 0
    busy = own = 0.0
    for event in events:
        name = event.key
        if event.device_type == torch.autograd.DeviceType.CUDA:
            busy += event.self_device_time_total
            own += event.self_device_time_total if "rat::" in name else 0
        elif name.startswith("cu") and "Launch" in name:
            launches += event.count
        # The profiler synchronises the device itself; nothing else here does.
        elif name in ("cudaMemcpy", "cudaStreamSynchronize", "cudaEventSynchronize"):
            syncs += event.count
    return {"launches": launches, "host_syncs": syncs, "own_share": own / busy if busy else None}


def profiled(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize(device)
    # A region that torch.compile marks takes the time of its kernels once more.
    events = profile.key_averages()
    return count(each for each in events if not getattr(each, "is_user_annotation", False))


def perturb_bandwidth(device: torch.device, rows: int, shape: tuple[int, ...]) -> dict[str, float]:
    """Achieved GB/s of the perturb kernel, and of a copy, counting bytes read and written."""
    x = torch.rand(rows, *shape, device=device)
    direction = torch.randint(-1, 2, x.shape, dtype=torch.int8, device=device)
    index = torch.arange(rows, dtype=torch.int32, device=device)
    radii = torch.rand(rows, 1, device=device)
    out = torch.empty_like(x)
    launch = launch_arguments(x.device)
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


def run_case(case: Case, device: torch.device, seconds: float, end: float) -> dict[str, Any]:
    """Measures every contender that starts before `end`."""
    # Both ways of asking for TF32 are left in agreement; torch refuses to read them otherwise.
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    with contextlib.nullcontext() if case.tf32 else full_float32():
        return _run_case(case, device, seconds, end)


def _run_case(case: Case, device: torch.device, seconds: float, end: float) -> dict[str, Any]:
    torch.manual_seed(0)
    net, shape = build_model(case.model)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    x = torch.rand(case.batch, *shape, device=device).contiguous(memory_format=layout)
    net = net.to(device, memory_format=layout)
    model: Any = Centred(net, torch.rand(8, *shape, device=device)).eval()
    if case.compiled:
        model = torch.compile(model, backend=case.compiled)
    sizes: list[int] = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x)

    result = robust_radius(watched, x, rtol=RTOL, full=True)
    with torch.no_grad():
        seed = torch.ones_like(model(x))
    floor = partial(call_model, model, x, seed, [case.batch] * 2)
    alone = partial(call_model, model, x, seed, sizes[1:])
    steps = steps_for(result.radius)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "floor": lambda: floor,
        "floor graph": lambda: captured(floor, device),
        "model": lambda: alone,
        "model graph": lambda: captured(alone, device),
        "robust_radius": lambda: partial(robust_radius, model, x, rtol=RTOL, full=True),
        **{mode: partial(estimator_in, mode, model, x) for mode in LOOPS},
        "bisection": lambda: partial(plain_bisection, model, x, steps),
        "textbook": lambda: partial(reference.robust_radius, model, x, rtol=RTOL, regrad=True),
    }
    contenders: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        entry = contenders[name] = {}
        try:
            if out_of_time(end):
                raise TimeoutError("out of time")
            work = make()
            entry |= milliseconds(work, device, seconds)
            if name in MODEL_ALONE:
                entry |= profiled(work, device)
                same = torch.isclose(work().radius, result.radius, rtol=2 * RTOL)
                entry["agrees"] = float(same.double().mean())
        except Exception as error:
            entry["error"] = one_line(error)
            entry["failed"] = not (isinstance(error, NotImplementedError) or out_of_time(end))
        work = None  # gives back its memory, graphs and all
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "case": str(case),
        **case._asdict(),
        "bisection_steps": steps,
        "forward_rows": float(result.forward_rows.double().mean()),
        "found": float(result.found.double().mean()),
        "contenders": with_ratios(contenders),
    }


def out_of_time(end: float) -> bool:
    return time.perf_counter() >= end


# ---- What is told --------------------------------------------------------------------------------


def with_ratios(contenders: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Times against the lower floor and the textbook, and the shares outside the model."""
    times = {name: entry["ms"] for name, entry in contenders.items() if "ms" in entry}
    floors = [times[name] for name in ("floor", "floor graph") if name in times]
    for name, ms in times.items():
        entry = contenders[name]
        entry["times_floor"] = ms / min(floors) if floors else None
        entry["times_faster_than_textbook"] = (
            times["textbook"] / ms if "textbook" in times else None
        )
        if (alone := times.get(MODEL_ALONE.get(name, ""))) is not None:
            entry["outside"] = 1 - alone / ms
    return contenders


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def cell(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)


def table(case: dict[str, Any]) -> str:
    """The contenders of a case, and how the fastest search does against the targets."""
    heads = ("ms", "x floor", "textbook/", "outside", "own", "launches", "syncs", "agrees")
    lines = [f"{case['case']}: {case['forward_rows']:.2f} rows, {case['found']:.0%} found"]
    lines.append(f"  {'':14}" + "".join(f"{head:>10}" for head in heads))
    for name, entry in case["contenders"].items():
        if "ms" in entry:
            cells = (
                cell(entry["ms"], "{:.3f}"),
                cell(entry["times_floor"], "{:.2f}"),
                cell(entry["times_faster_than_textbook"], "{:.1f}"),
                cell(entry.get("outside"), "{:.1%}"),
                cell(entry.get("own_share"), "{:.1%}"),
                cell(entry.get("launches"), "{}"),
                cell(entry.get("host_syncs"), "{}"),
                cell(entry.get("agrees"), "{:.0%}"),
            )
            lines.append(f"  {name:14}" + "".join(f"{each:>10}" for each in cells))
        if "error" in entry:
            lines.append(f"  {name:14}{'FAILED: ' if entry['failed'] else ''}{entry['error']}")
    searches = [name for name in MODEL_ALONE if "ms" in case["contenders"][name]]
    if searches:
        best = min(searches, key=lambda name: case["contenders"][name]["ms"])
        lines += targets(case["batch"], best, case["contenders"][best])
    return "\n".join(lines)


def targets(batch: int, name: str, entry: dict[str, Any]) -> list[str]:
    """The targets for this batch size beside what was measured."""
    told = []
    faster, outside = entry["times_faster_than_textbook"], entry.get("outside")
    if batch in TIMES_TEXTBOOK and faster is not None:
        least = TIMES_TEXTBOOK[batch]
        verdict = "met" if faster >= least else "MISSED"
        told.append(f"  target {least} x the textbook: {faster:.1f} x by {name}, {verdict}")
    if batch in MOST_OUTSIDE and outside is not None:
        most = MOST_OUTSIDE[batch]
        verdict = "met" if outside <= most else "MISSED"
        told.append(f"  target {most:.0%} outside the model: {outside:.1%} in {name}, {verdict}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=int, default=600, help="seconds until it stops")
    parser.add_argument("--seconds", type=float, default=0.5, help="about, for each contender")
    parser.add_argument("--more", action="store_true", help="the less important cases")
    parser.add_argument("--tiny", action="store_true", help="a toy, to test this script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and (problem := rat_ext.build_info().cuda_problem):
        parser.error(f"no usable GPU: {problem}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + arguments.budget

    def stop(*_: Any) -> None:
        raise TimeoutError("out of time")

    signal.signal(signal.SIGALRM, stop)  # also in the midst of compiling or capturing
    signal.alarm(arguments.budget)
    shape = (3, 8, 8) if arguments.tiny else (3, 224, 224)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "perturb": perturb_bandwidth(device, 8 if arguments.tiny else 256, shape),
        "cases": [],
        "skipped": [],
        "failed": [],
    }
    ratio = report["perturb"]["ratio"]
    print(f"perturb: {ratio:.0%} of the bandwidth of a copy", flush=True)
    for case in TINY if arguments.tiny else MORE if arguments.more else CASES:
        try:
            if out_of_time(end):
                raise TimeoutError("out of time")
            done = run_case(case, device, arguments.seconds, end)
            report["cases"].append(done)
            failed = [name for name, c in done["contenders"].items() if c.get("failed")]
            report["failed"] += [f"{case}: {name}" for name in failed]
            print(table(done), flush=True)
        except Exception as error:  # the other cases may do better
            line = f"{case}: {one_line(error)}"
            report["skipped" if out_of_time(end) else "failed"].append(line)
            print(line, flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    signal.alarm(0)
    if report["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
