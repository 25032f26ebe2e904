"""Random nets, inputs and options: does `rat_ext.robust_radius` do what it promises?

    python benchmarks/trials.py --nets 1000 --seed 0
    python benchmarks/trials.py --only 17 --kinds plain    # one net again

Each row of each net is checked by running the model again, and against a float64 scan of its ray.
docs/measurements/trials.md says what is checked, and what "wrong" and "at rounding" mean. The exit
status is 1 if anything was wrong.
"""

import argparse
import copy
import json
import math
import platform
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from trial_cases import KINDS, Case, attacks_of
from trial_rays import Ray, run

import rat_ext
from rat_ext import reference
from rat_ext.search.checked import Options

PROBES = (1, 2, 4, 8)


@dataclass
class Tally:
    """What was checked, and what was wrong."""

    nets: int = 0
    rows: int = 0
    checks: int = 0
    wrong: Counter = field(default_factory=Counter)
    at_rounding: Counter = field(default_factory=Counter)
    unresolved: int = 0
    non_monotone: Counter = field(default_factory=Counter)

    def check(self, name: str, bad: Tensor, rounding: Tensor | bool = False) -> None:
        """Count the rows that are `bad`, those that `rounding` explains apart."""
        excused = bad & rounding
        self.checks += bad.numel()
        self.wrong[name] += int((bad & ~excused).sum())
        self.at_rounding[name] += int(excused.sum())

    def add(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def state_of(net: nn.Module) -> list:
    """All that a call must leave as it was."""
    grads = [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()]
    values = [value.clone() for value in net.state_dict().values()]
    modes = torch.tensor([module.training for module in net.modules()])
    needs = torch.tensor([p.requires_grad for p in net.parameters()])
    return [torch.get_rng_state(), modes, needs, *values, *grads]


def same(a: list, b: list) -> bool:
    pairs = zip(a, b, strict=True)
    return all(p is q or (p is not None and q is not None and p.equal(q)) for p, q in pairs)


@torch.no_grad()
def try_out(case: Case) -> Tally:
    """All checks of one net."""
    tally = Tally(nets=1, rows=len(case.x))
    options, everyone = case.options, torch.ones(len(case.x), dtype=torch.bool)
    before = state_of(case.net)
    result, _ = run(case, case.x, options)
    tally.check("model left as it was", everyone & (not same(before, state_of(case.net))))
    case.net.eval()
    exact = copy.deepcopy(case.net).double()
    case.net.log, exact.log = [], None
    nets = (case.net, exact)
    finite = can_be_searched(case)
    tally.check("nan", result.radius.isnan() == finite)
    if result.worst_case_rows:
        tally.check("forward rows", result.forward_rows > result.worst_case_rows)
    attacks = attacks_of(options)
    alone = [run(case, case.x, options_for(options, attack)) for attack in attacks]
    points = torch.cat(case.net.log)
    case.net.log = None
    # The same rows in the same batches: to the bit the smallest, or the same again. Only a user's
    # attack beside a target cannot be repeated alone: its search starts from the target's slope.
    if not ("target" in options and any(map(callable, attacks))):
        radii = torch.stack([each.radius for each, _ in alone])
        tally.check("smallest", (result.radius != radii.amin(0)) & finite)
    for attack, (each, rays) in zip(attacks, alone, strict=True):
        chosen = Options.checked(case.x, **options_for(options, attack))
        ray = Ray(nets, case.x[finite], rays[0][finite], chosen)
        if len(ray.x):
            check_attack(tally, case, ray, each[finite], options_for(options, attack), points)
    return tally


def can_be_searched(case: Case) -> Tensor:
    """(N,) bool: the input, its logits and their gradient are finite."""
    x, temperature = case.x, case.options.get("temperature", 1.0)
    gradient, z, *_ = reference.attack_gradient(case.net, x, temperature, None)
    finite = [tensor.flatten(1).isfinite().all(1) for tensor in (x, gradient, z)]
    return torch.stack(finite).all(0)


def options_for(options: dict, attack) -> dict:
    """These options for one attack, without what it does not take."""
    named = isinstance(attack, str)
    drop = {"norm" if named else "target"} | (set() if named and "pgd" in attack else {"steps"})
    return {**{k: v for k, v in options.items() if k not in drop}, "attack": attack}


def check_attack(tally: Tally, case: Case, ray: Ray, result, options: dict, points) -> None:
    """All checks of the finite rows, for one attack."""
    y, found, chosen = result.prediction, result.found, ray.options
    rows = torch.arange(len(y))
    _, z, band = ray.logits(ray.x)
    others = z.amax(1) - z[rows, y.clamp_min(0)]
    tally.check("prediction", (others > 0) | (y < 0), others <= band)
    if (y < 0).any():
        return
    tally.check("direction", *direction_is_off(case, ray))
    tally.check("found", found != result.radius.isfinite())
    tally.check("radius", (result.radius != (result.lower + result.upper) / 2) & found)
    if chosen.method == "fast":
        return check_fast(tally, ray, result)
    resolved = getattr(result, "resolved", torch.ones_like(found))
    width = result.upper.double() - result.lower.double()
    too_wide = found & (width > chosen.rtol * result.upper.double() * (1 + 1e-6))
    tally.check("tolerance", too_wide & resolved)
    # Not resolved is an excuse for brackets that are a few steps of the input's numbers wide, or of
    # numbers like the radius, or as small as normal numbers are.
    size = ray.points(result.upper.where(found, 0)).abs().flatten(1).amax(1).double()
    size = size.maximum(result.upper.where(found, 0).double())
    steps = 20 * torch.finfo(ray.x.dtype).eps * size + 4 * torch.finfo(result.upper.dtype).tiny
    tally.check("resolution", found & ~resolved & (width > steps))
    tally.unresolved += int((found & ~resolved).sum())
    at_end = torch.full_like(result.lower.double(), chosen.eps_max).to(result.lower.dtype)
    tally.check("end", ~found & ((result.lower != at_end) | ~result.upper.isposinf()))
    tally.check("beyond eps_max", found & (result.upper > at_end))

    eps, signs = ray.scan(result)
    # A change at the very end of the ray cannot be missed.
    tally.check("not found", ~found & (signs[-1] < 0))
    if "pgd" in chosen.attacks[0].name:
        return check_ball(tally, case, ray, result, options, points)
    check_bracket(tally, ray, result)
    turns = (((signs < 0).cumsum(0) > 0) & (signs > 0)).any(0)
    last_kept = eps.where(signs > 0, 0).amax(0)
    first_changed = eps.where(signs < 0, math.inf).amin(0)
    outside = (result.lower > first_changed) | (result.upper < last_kept)
    ends = [ray.margin(y, end.where(found, 0)) for end in (result.lower, result.upper)]
    rounding = torch.stack([margin.abs() <= band for margin, band in ends]).any(0)
    tally.check("crossing", outside & found & ~turns, rounding)
    check_exact(tally, ray, result, found & resolved & ~turns)
    count_non_monotone(tally, case, ray[turns], options, first_changed[turns])

    order = torch.randperm(len(y))
    split = {"batch_size": max(int(torch.randint(1, 9, ())), options.get("probes", 1))}
    again, rays = run(case, ray.x[order], {**options, **split})
    back = order.argsort()
    compare(tally, "batching", ray, result, again[back], ~turns, rays[0][back])
    if chosen.attacks[0].by_gradient and ray.x.dtype == torch.float64:
        ours = {k: v for k, v in options.items() if k not in ("norm", "probes", "search")}
        with case.net.stopping():
            twin = reference.robust_radius(case.net, ray.x, full=True, **ours)
        theirs = reference.fgsm_direction(
            case.net, ray.x, chosen.temperature, chosen.norm, chosen.target
        )
        compare(tally, "reference", ray, result, twin, ~turns, theirs[0])


def direction_is_off(case: Case, ray: Ray) -> tuple[Tensor, Tensor]:
    """(N,) bool: not of norm 1, or, where the gradient gives it, not that of the gradient.

    And whether rounding decides: the model's gradient in its own type leads elsewhere than in
    float64, by underflow.
    """
    direction, chosen = ray.direction.double().flatten(1), ray.options
    length = direction.norm(dim=1) if chosen.norm == "l2" else direction.abs().amax(1)
    off = ((length - 1).abs() > 1e-4) & (length != 0)
    if not chosen.attacks[0].by_gradient:
        return off, torch.zeros_like(off)
    allowed = {8: 1e-6, 4: 1e-2, 2: 0.2}[ray.x.element_size()]

    def gradient_of(net, x: Tensor) -> Tensor:
        gradient = reference.attack_gradient(net, x, chosen.temperature, chosen.target)[0]
        return gradient.double().flatten(1)

    def lost(gradient: Tensor, direction: Tensor) -> Tensor:
        right = reference.steepest(gradient, chosen.norm)
        return (gradient * (right - direction)).sum(1) / (gradient * right).sum(1)

    own, exact = gradient_of(case.net, ray.x), gradient_of(ray.nets[1], ray.x.double())
    coarse = lost(exact, reference.steepest(own, chosen.norm))
    return off | (lost(own, direction) > allowed), ~off & (coarse > allowed)


def check_bracket(tally: Tally, ray: Ray, result) -> None:
    """The prediction holds at `lower`, and is `flipped_to` at `upper`."""
    y, found = result.prediction, result.found
    own, _, _ = ray.logits(ray.points(result.lower))
    margin, band = ray.margin(y, result.lower)
    tally.check("lower", own.argmax(1) != y, margin.abs() <= band)
    upper = result.upper.where(found, 0)
    own, z, band = ray.logits(ray.points(upper))
    to = result.flipped_to.clamp_min(0)
    margin, _ = ray.margin(y, upper)
    tally.check("upper", found & (own.argmax(1) == y), margin.abs() <= band)
    short = z.amax(1) - z.gather(1, to[:, None])[:, 0]
    bad = (own.argmax(1) != result.flipped_to) | (to == y)
    tally.check("flipped_to", found & bad, (short <= band) & (to != y))
    tally.check("flipped_to", ~found & (result.flipped_to != -1))


def check_exact(tally: Tally, ray: Ray, result, asked: Tensor) -> None:
    """The crossing of the ray whose points are not rounded is in the bracket, or a tolerance off.

    Where the input's numbers are too coarse for that, a result must say so.
    """
    exact = Ray((ray.nets[1],) * 2, ray.x.double(), ray.direction, ray.options)
    tolerance = ray.options.rtol * result.upper.double()
    bad = rounding = torch.zeros_like(asked)
    for sign, end in ((1, result.lower), (-1, result.upper)):
        nowhere, close = asked, torch.zeros_like(asked)
        for radius in (end, (end - sign * tolerance).clamp_min(0)):
            margin, _ = exact.margin(result.prediction, radius.where(asked, 0))
            _, band = ray.margin(result.prediction, radius.where(asked, 0))
            nowhere, close = nowhere & (sign * margin < 0), close | (margin.abs() <= band)
        bad, rounding = bad | nowhere, rounding | (nowhere & close)
    tally.check("off", bad, rounding | (tolerance < 4 * steps_of(ray.x).amax()))


def steps_of(x: Tensor) -> Tensor:
    """(N,) the spacing of numbers like the largest of each row."""
    return torch.finfo(x.dtype).eps * x.double().abs().flatten(1).amax(1)


def check_ball(tally: Tally, case: Case, ray: Ray, result, options: dict, points: Tensor) -> None:
    """PGD: a point that was probed, in the ball of radius `upper`, is of class `flipped_to`."""
    without = {k: v for k, v in options.items() if k != "steps"}
    by_ray, _ = run(case, ray.x, {**without, "attack": options["attack"].replace("pgd", "fgsm")})
    if len(ray.x) == len(case.x):  # the same batches: the ray is the same to the bit
        tally.check("pgd above fgsm", ~(result.radius <= by_ray.radius))
    norm = 2 if ray.options.norm == "l2" else math.inf
    for i in result.found.nonzero().flatten().tolist():
        distance = (points.double() - ray.x[i].double()).flatten(1).norm(norm, dim=1)
        spacing = torch.finfo(points.dtype).eps * points.abs().nan_to_num(0).amax().double()
        near = distance <= float(result.upper[i]) * (1 + 1e-5) + spacing
        own, z, band = ray.logits(points[near])
        to = int(result.flipped_to[i])
        right, close = own.argmax(1) == to, z.amax(1) - z[:, to] <= band
        coarse = ray.options.rtol * float(result.upper[i]) < 4 * steps_of(ray.x)[i]
        bad = ~right.any()[None] | (to == result.prediction[i])
        tally.check("upper", bad, close.any() | coarse)


def check_fast(tally: Tally, ray: Ray, result) -> None:
    """RR-Fast, in interval arithmetic: between the smallest and largest crossing of the gaps."""
    h, y = ray.options.h, result.prediction[:, None]
    tally.check("forward rows", result.forward_rows > 1)  # 0: nothing can move
    _, z, band = ray.logits(ray.x)
    _, z_h, band_h = ray.logits(ray.points(torch.full_like(result.lower, h)))
    gap = z.gather(1, y) - z
    fall = gap - (z_h.gather(1, y) - z_h)
    off, off_fall = band[:, None], (band + band_h)[:, None]
    low = h * (gap - off).clamp_min(0) / (fall + off_fall)
    low = low.where(fall + off_fall > 0, math.inf).scatter(1, y, math.inf).amin(1)
    high = h * (gap + off) / (fall - off_fall)
    high = high.where(fall - off_fall > 0, math.inf).scatter(1, y, math.inf).amin(1)
    radius = result.radius.double()
    tally.check("fast", (radius < low * (1 - 1e-5)) | (radius > high * (1 + 1e-5)))


def count_non_monotone(tally: Tally, case: Case, ray: Ray, options: dict, first: Tensor) -> None:
    """On rays that leave the class and come back: what is missed, with few and many probes."""
    if not len(ray.x):
        return
    tally.non_monotone["rows"] += len(ray.x)
    for probes in PROBES:
        result, _ = run(case, ray.x, {**options, "probes": probes, "batch_size": None})
        tally.non_monotone[f"not found, {probes} probes"] += int((~result.found).sum())
        later = result.found & (result.lower > first)
        tally.non_monotone[f"later crossing, {probes} probes"] += int(later.sum())
        rows = int(result.forward_rows.sum())
        tally.non_monotone[f"forward rows, {probes} probes"] += rows


def compare(tally: Tally, name: str, ray: Ray, a, b, asked: Tensor, direction: Tensor) -> None:
    """Two results of the same rays: the same classes, and brackets that overlap."""
    tally.check(name, a.prediction != b.prediction, ray.margin(a.prediction, a.lower * 0)[0] == 0)
    apart = (direction.double() - ray.direction.double()).flatten(1).abs().amax(1)
    loose = {8: 1e-9, 4: 1e-5, 2: 1e-2}[ray.x.element_size()]
    asked = asked & (apart <= loose) & (a.prediction == b.prediction)
    if a.radius.equal(b.radius):  # also all RR-Fast that agree
        return
    changed, kept = a.upper.minimum(b.upper), a.lower.maximum(b.lower)
    bad = (kept > changed * (1 + loose)) | (a.found != b.found)
    rounding = torch.zeros_like(bad)
    for end in (changed.where(changed.isfinite(), 0), kept):
        margin, band = ray.margin(a.prediction, end)
        rounding |= margin.abs() <= band
    tally.check(name, bad & asked, rounding)


# --- The trial ------------------------------------------------------------------------------------


def trial(seeds, kinds, progress: bool = False, report=print) -> tuple[Tally, list[dict]]:
    """All checks of the nets of these seeds; those with something wrong, with what it was."""
    total, failing = Tally(), []
    for seed in tqdm(seeds, disable=not progress):
        case = Case(seed, kinds[seed % len(kinds)])
        try:
            tally = try_out(case)
        except Exception as error:
            tally = Tally(nets=1, rows=len(case.x), wrong=Counter({"error": len(case.x)}))
            where = traceback.extract_tb(error.__traceback__)[-1]
            report(f"{error!r} at {Path(where.filename).name}:{where.lineno}")
        if wrong := dict(+tally.wrong):
            failing.append({"seed": seed, "kind": case.kind, "wrong": wrong})
            report(f"{wrong}: {case}")
        total.add(tally)
    return total, failing


def summary(tally: Tally, failing: list[dict], arguments: argparse.Namespace) -> dict:
    return {
        "settings": {"nets": arguments.nets, "seed": arguments.seed, "kinds": arguments.kinds},
        "versions": {
            "rat_ext": rat_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "nets": tally.nets,
        "rows": tally.rows,
        "checks": tally.checks,
        "wrong": dict(+tally.wrong),
        "at_rounding": dict(+tally.at_rounding),
        "unresolved": tally.unresolved,
        "non_monotone": dict(tally.non_monotone),
        "failing": failing,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first net; they count up")
    parser.add_argument("--only", type=int, metavar="SEED", help="this one net")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default %(default)s")
    parser.add_argument("--out", type=Path, help="write the counts here, as JSON")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    given = parser.parse_args(arguments)
    given.kinds = given.kinds.split(",")
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"unknown kind {min(unknown)!r}; there are {', '.join(KINDS)}")
    if given.only is not None:
        given.seed, given.nets = given.only, 1
    torch.set_num_threads(1)  # small nets: more threads only get in each other's way
    seeds = range(given.seed, given.seed + given.nets)
    tally, failing = trial(seeds, given.kinds, given.progress, tqdm.write)
    counts = summary(tally, failing, given)
    print(json.dumps({k: v for k, v in counts.items() if k != "failing"}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(counts, indent=1) + "\n")
    return 1 if failing else 0


if __name__ == "__main__":
    raise SystemExit(main())
