"""Robust radii by every way there is: what they cost, in rows and in time, and whether they agree.

    python benchmarks/throughput.py [--models ...] [--batches ...] [--contenders ...]

In each round all contenders measure the same samples, one after the other; times are medians over
the rounds, and ratios are medians of the ratios within a round. Where the shared folder is present
the CIFAR ResNets are trained ones on test images; all other models have random weights and get
uniform noise, so that their radii mean nothing and only the cost counts.

The parameters are frozen, so that no contender pays for their gradients. The peers (foolbox and
torchattacks) take one FGSM step of given size; around it is the driver that a careful user would
write: 24 probes with a step for each sample, doubling from 1e-6 and then bisecting.

`agree` is the share of samples within 2 rtol (2e-2 for those without one) of the bisection of
`rat_ext.reference` in float64. `wrong` counts those that neither agree nor are a crossing of the
boundary: the float64 model is asked at radius * (1 -+ 2 rtol). The rest is on rays that cross more
than once, where searches may differ and be right.

Each pair of a model and a batch size gets at most --seconds. Contenders of which a round would take
longer are left out, the dearest first, and are named.

On a machine that others use as well, set OMP_WAIT_POLICY=passive: threads that spin while they wait
for one that is not running make every contender many times slower. (It has a price of its own where
operations are small: ResNet-20 at batch 1 is up to 4 times slower with it.)
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import load_model, load_test_images, shared_folder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

import rat_ext
from rat_ext import models, reference
from rat_ext.search.checked import Options

MODELS = (
    "mlp",
    "resnet20",
    "resnet56",
    "wrn-28-10",
    "torchvision:resnet18",
    "torchvision:resnet50",
)
TRAINED = ("resnet20", "resnet56")
RESULTS = Path(__file__).resolve().parent / "results"
PEER_PROBES = 24

Radii = tuple[Tensor, Tensor]  # (N,) radii and (N,) forward rows beside the first, of the ray


# --- The contenders -------------------------------------------------------------------------------


def floor_forward(model: nn.Module, x: Tensor, batch: int) -> None:
    with torch.no_grad():
        for rows in x.split(batch):
            model(rows)


def floor_backward(model: nn.Module, x: Tensor, batch: int) -> None:
    for rows in x.split(batch):
        leaf = rows.clone().requires_grad_()
        torch.autograd.grad(model(leaf).amax(1).sum(), leaf)


def ours(**options: Any) -> Callable[[nn.Module, Tensor, int], Radii]:
    def radii(model: nn.Module, x: Tensor, batch: int) -> Radii:
        result = rat_ext.robust_radius(model, x, batch_size=batch, full=True, **options)
        return result.radius, result.forward_rows

    return radii


def plain(**options: Any) -> Callable[[nn.Module, Tensor, int], Radii]:
    def radii(model: nn.Module, x: Tensor, batch: int) -> Radii:
        result = reference.robust_radius(model, x, batch_size=batch, full=True, **options)
        return result.radius, result.forward_rows

    return radii


def peer(
    attack: Callable[[nn.Module, Tensor, Tensor], Callable[[Tensor], Tensor]],
) -> Callable[[nn.Module, Tensor, int], Radii]:
    """The radii by an attack: from a model, x and y to a function from step sizes to images."""

    def radii(model: nn.Module, x: Tensor, batch: int) -> Radii:
        found = torch.cat([_bisected(model, rows, attack) for rows in x.split(batch)])
        return found, torch.full((len(x),), 2 * PEER_PROBES)

    return radii


@torch.no_grad()
def _bisected(model: nn.Module, x: Tensor, attack: Callable[..., Any]) -> Tensor:
    y = model(x).argmax(1)
    with torch.enable_grad():
        adversarial = attack(model, x, y)
    lower = x.new_zeros(len(x))
    upper = torch.full_like(lower, torch.inf)
    eps = torch.full_like(lower, 1e-6)
    for _ in range(PEER_PROBES):
        with torch.enable_grad():
            moved = adversarial(eps.view(-1, *[1] * (x.ndim - 1)))
        flipped = model(moved).argmax(1) != y
        lower, upper = eps.where(~flipped, lower), eps.where(flipped, upper)
        eps = ((lower + upper) / 2).where(upper.isfinite(), (2 * eps).clamp_max(1))
    return (lower + upper) / 2


def foolbox_attack(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please import `gaussian_filter`")
        import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfFastGradientAttack()
    criterion = foolbox.criteria.Misclassification(y)
    return lambda eps: attack.run(wrapped, x, criterion, epsilon=eps)


def torchattacks_attack(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    import torchattacks

    attack = torchattacks.FGSM(model)

    def adversarial(eps: Tensor) -> Tensor:
        attack.eps = eps
        return attack(x, y)

    return adversarial


class Contender(NamedTuple):
    run: Callable[[nn.Module, Tensor, int], Radii | None]
    forwards: float
    """About how many times a forward's time it takes: for planning alone."""
    rtol: float = 1e-2
    needs: str | None = None
    """A package that may be missing."""


CONTENDERS = {
    "forward": Contender(floor_forward, 1),
    "forward + backward": Contender(floor_backward, 2.5),
    "rat_ext bs": Contender(ours(), 6.5),
    "rat_ext bs 2^-12": Contender(ours(rtol=2**-12), 8, 2**-12),
    "rat_ext fast": Contender(ours(method="fast"), 3.5),
    "rat_ext bisect": Contender(ours(search="bisect"), 20),
    "fixed ray": Contender(plain(rtol=2**-12), 26, 2**-12),
    "textbook": Contender(plain(regrad=True), 75),
    "foolbox": Contender(peer(foolbox_attack), 75, needs="foolbox"),
    "torchattacks": Contender(peer(torchattacks_attack), 75, needs="torchattacks"),
}
MAIN = "rat_ext bs"
ORACLE = {"rtol": 2.0**-14}
ORACLE_FORWARDS = 75


# --- What else a search costs ---------------------------------------------------------------------


class Watched(nn.Module):
    """The model, with the time spent in its forward and in `torch.autograd.grad` added up."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seconds = 0.0
        self.running = False
        self.grad = torch.autograd.grad

    def forward(self, x: Tensor) -> Tensor:
        return self._timed(self.model, x)

    def backward(self, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        return self._timed(self.grad, *arguments, **options)

    def _timed(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.running = True
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - start
            self.running = False


class Allocations(TorchDispatchMode):
    """The most bytes alive at once of tensors made while the model is not running.

    Any operation of torch that makes a tensor passes through here; the compiled core makes none.
    """

    def __init__(self, watched: Watched, x: Tensor) -> None:
        super().__init__()
        self.watched, self.input = watched, x.untyped_storage()
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.watched.running:
            self.add(made)
        return made

    def add(self, made: Any) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() is not self.input:
                self.alive.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))


def share_outside(model: nn.Module, x: Tensor, batch: int) -> float:
    """The share of rat_ext's time that is not in the model's forward and backward."""
    watched = Watched(model)
    with mock.patch.object(torch.autograd, "grad", watched.backward):
        start = time.perf_counter()
        CONTENDERS[MAIN].run(watched, x, batch)
        return 1 - watched.seconds / (time.perf_counter() - start)


def extra_memory(model: nn.Module, x: Tensor, batch: int) -> float:
    """The most memory that rat_ext holds beside the model's own, in multiples of x.

    The gradient of x counts: the model's backward makes it, but the search holds it.
    """
    watched = Watched(model)
    allocations = Allocations(watched, x)

    def backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        gradients = watched.backward(*arguments, **options)
        allocations.add(gradients)
        return gradients

    with mock.patch.object(torch.autograd, "grad", backward), allocations:
        CONTENDERS[MAIN].run(watched, x, batch)
    return allocations.peak / (x.numel() * x.element_size())


# --- Right or wrong -------------------------------------------------------------------------------


class Oracle:
    """Radii of the first samples, by bisection in float64."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = copy.deepcopy(model).double(), x
        self.radii = torch.empty(0, dtype=torch.float64)

    def first(self, count: int, batch: int) -> Tensor:
        missing = self.x[len(self.radii) : count].double()
        new = reference.robust_radius(self.model, missing, batch_size=batch, **ORACLE)
        self.radii = torch.cat([self.radii, new])
        return self.radii[:count]

    def wrong(self, radii: Tensor, off: Tensor, rtol: float) -> int:
        """How many of the radii at the indices `off` are not at a crossing of the boundary."""
        if not len(off):
            return 0
        x, radius = self.x[off].double(), radii[off].double()
        options = Options.checked(x)
        direction, _, y = reference.fgsm_direction(self.model, x, options.temperature)

        def changed(eps: Tensor) -> Tensor:
            with torch.no_grad():
                moved = reference.on_ray(x, direction, eps.clamp_max(options.eps_max), options)
                return self.model(moved).argmax(1) != y

        kept = ~changed(radius * (1 - 2 * rtol))
        crossing = changed(radius * (1 + 2 * rtol)).where(radius.isfinite(), True)
        return int((~(kept & crossing)).sum())


# --- One model and batch size ---------------------------------------------------------------------


def build(name: str, shared: Path, samples: int) -> tuple[nn.Module, Tensor]:
    """The model, frozen and in eval mode, and (samples, ...) inputs."""
    torch.manual_seed(0)
    if name in TRAINED and (shared / "models").is_dir():
        return load_model(shared, name).requires_grad_(False), load_test_images(shared, samples)[0]
    torchvision = name.startswith("torchvision:")
    size = 224 if torchvision else 32
    if name == "mlp":
        model: nn.Module = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * size * size, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 10),
        )
    else:
        model = models.create(name, 1000 if torchvision else 10)
    return model.eval().requires_grad_(False), torch.rand(samples, 3, size, size)


def forward_seconds(model: nn.Module, x: Tensor, batch: int) -> float:
    """About how long a forward of all of x takes, from a small one."""
    few = x[: min(batch, 16)]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        floor_forward(model, few, batch)
        seconds.append(time.perf_counter() - start)
    return min(seconds) * len(x) / len(few)


def plan(
    names: list[str], fixed: float, seconds_forward: float, seconds: float
) -> tuple[list[str], dict[str, str]]:
    """The contenders of which a round fits in `seconds`, and why others are left out.

    `fixed` is what is to be done beside, in forwards. Without MAIN there is nothing to compare.
    """
    skipped = {}
    for name in names:
        package = CONTENDERS[name].needs
        if package and not importlib.util.find_spec(package):
            skipped[name] = f"{package} is not installed (pip install '.[bench]')"
    taken = [name for name in names if name not in skipped]
    while taken:
        needed = seconds_forward * (fixed + sum(CONTENDERS[name].forwards for name in taken))
        if needed <= seconds:
            break
        dearest = max(reversed(taken), key=lambda name: CONTENDERS[name].forwards)
        for name in names if dearest == MAIN else [dearest]:
            skipped[name] = f"it would take about {needed:.0f} s; raise --seconds"
        taken = [name for name in taken if name not in skipped]
    return taken, skipped


def measure(
    name: str,
    model: nn.Module,
    x: Tensor,
    oracle: Oracle,
    batch: int,
    contenders: list[str],
    rounds: int,
    seconds: float,
    checked: int,
) -> dict[str, Any]:
    """All that is measured of one model at one batch size."""
    start = time.perf_counter()
    # Beside the contenders: the oracle, and MAIN to warm up, for the time outside and the memory.
    unknown = max(0, checked - len(oracle.radii)) / len(x)
    fixed = ORACLE_FORWARDS * unknown + 3 * CONTENDERS[MAIN].forwards
    taken, skipped = plan(contenders, fixed, forward_seconds(model, x, batch), seconds)
    result: dict[str, Any] = {"model": name, "batch": batch, "samples": len(x), "skipped": skipped}
    if not taken:
        return result | {"rounds": 0, "contenders": {}}
    times: dict[str, list[float]] = {contender: [] for contender in taken}
    outside, radii = [], {}
    floor_backward(model, x[:batch], batch)  # the first run warms up
    CONTENDERS[MAIN].run(model, x[:batch], batch)
    steps = rounds * len(taken) + 2
    with tqdm(total=steps, desc=f"{name}, batch {batch}", unit="run", leave=False) as bar:
        bar.set_postfix_str("float64")
        expected = oracle.first(checked, batch)
        bar.update()
        for _ in range(rounds):
            round_start = time.perf_counter()
            for contender in taken:
                bar.set_postfix_str(contender)
                begin = time.perf_counter()
                radii[contender] = CONTENDERS[contender].run(model, x, batch)
                times[contender].append(time.perf_counter() - begin)
                bar.update()
            outside.append(share_outside(model, x, batch))
            now = time.perf_counter()
            if 2 * now - round_start - start > seconds:  # the next round would end too late
                break
        memory = extra_memory(model, x, batch)
        bar.update()
    rows = {}
    for contender in taken:
        row: dict[str, Any] = {"seconds": times[contender]}
        row["ms_per_sample"] = 1e3 * statistics.median(times[contender]) / len(x)
        if MAIN in taken:
            ratios = [a / b for a, b in zip(times[contender], times[MAIN], strict=True)]
            row["times_ours"] = statistics.median(ratios)
        if radii[contender] is not None:
            row |= _quality(*radii[contender], expected, oracle, CONTENDERS[contender])
        rows[contender] = row
    return result | {
        "rounds": len(outside),
        "checked": len(expected),
        "found": float(expected.isfinite().double().mean()),
        "outside_model": statistics.median(outside),
        "extra_memory": memory,
        "contenders": rows,
    }


def _quality(
    radii: Tensor, forward_rows: Tensor, expected: Tensor, oracle: Oracle, contender: Contender
) -> dict[str, float]:
    radii = radii[: len(expected)]
    agree = torch.isclose(radii.double(), expected, rtol=2 * contender.rtol, atol=0)
    return {
        "rows_mean": float(forward_rows.double().mean()),
        "rows_p95": float(forward_rows.double().quantile(0.95)),
        "agree": float(agree.double().mean()),
        "wrong": oracle.wrong(radii, (~agree).nonzero().squeeze(1), contender.rtol),
    }


# --- Output ---------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The lines on one model and batch size."""
    lines = [f"{result['model']}, batch {result['batch']}: {result['samples']} samples"]
    if result["contenders"]:
        lines[0] += (
            f", {result['checked']} checked ({result['found']:.0%} found), "
            f"{result['rounds']} rounds; of rat_ext bs "
            f"{result['outside_model']:.1%} of the time is outside the model, and the extra memory "
            f"is {result['extra_memory']:.2f} x the input"
        )
        lines.append(
            "  contender            ms/sample   x rat_ext bs   rows mean   rows p95   agree   wrong"
        )
    for name, row in result["contenders"].items():
        line = f"  {name:19s} {row['ms_per_sample']:10.3f}   {row.get('times_ours', 0):12.2f}"
        if "rows_mean" in row:
            line += (
                f"   {row['rows_mean']:9.2f}   {row['rows_p95']:8.1f}   {row['agree']:5.1%}"
                f"   {row['wrong']:5d}"
            )
        lines.append(line)
    for reason in dict.fromkeys(result["skipped"].values()):
        names = [name for name, why in result["skipped"].items() if why == reason]
        lines.append(f"  skipped: {', '.join(names)}: {reason}")
    return "\n".join(lines) + "\n"


def save(results: list[dict[str, Any]], out: Path) -> None:
    """Write the JSON; the old one stays if this is interrupted."""
    machine = {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "throughput.json.part"
    partial.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    partial.replace(out / "throughput.json")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Rows and time per sample of each contender: a colour for each model, a mark per batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [result for result in results if result["contenders"]]
    names = [n for n in CONTENDERS if any(n in result["contenders"] for result in measured)]
    colours = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(r["model"] for r in measured))}
    batches = sorted({result["batch"] for result in measured})
    marks = dict(zip(batches, "osD^v*P" * len(batches), strict=False))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for result in measured:
        style = {"color": colours[result["model"]], "marker": marks[result["batch"]], "ls": ""}
        rows = [(names.index(n), row) for n, row in result["contenders"].items()]
        searches = [(place, row) for place, row in rows if "rows_mean" in row]
        left.plot([row["rows_mean"] for _, row in searches], [p for p, _ in searches], **style)
        right.plot([row["ms_per_sample"] for _, row in rows], [p for p, _ in rows], **style)
    left.set(xscale="log", xlabel="forward rows per sample, beside the ray's own")
    right.set(xscale="log", xlabel="ms per sample")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    for model, colour in colours.items():
        right.plot([], [], color=colour, marker="o", ls="", label=model)
    for batch, mark in marks.items():
        right.plot([], [], color="grey", marker=mark, ls="", label=f"batch {batch}")
    right.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128], metavar="N")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--samples", type=int, help="default one batch, but at least 4 samples")
    parser.add_argument("--checked", type=int, help="samples checked in float64; default all")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--seconds", type=float, default=75, help="most for a model and batch")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of throughput.json, .png")
    options = parser.parse_args(arguments)
    positive = options.samples or 1, options.checked or 1, options.rounds, options.threads
    if min(*options.batches, *positive) < 1:
        parser.error("--batches, --samples, --checked, --rounds and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    if not (options.shared / "models").is_dir():
        print(f"there is no {options.shared / 'models'}: all models have random weights")
    dtype = getattr(torch, options.dtype)
    results: list[dict[str, Any]] = []
    for name in options.models:
        samples = options.samples or max(*options.batches, 4)
        model, x = build(name, options.shared, samples)
        model, x = model.to(dtype), x.to(dtype)
        oracle = Oracle(model, x)
        for batch in sorted(options.batches):
            count = options.samples or max(batch, 4)
            names = options.contenders or list(CONTENDERS)
            limits = options.rounds, options.seconds, min(options.checked or count, count)
            results.append(measure(name, model, x[:count], oracle, batch, names, *limits))
            print(table(results[-1]), flush=True)
            save(results, options.out)
    plot(results, options.out / "throughput.png")
    print(f"written: {options.out / 'throughput.json'} and throughput.png")


if __name__ == "__main__":
    main()
