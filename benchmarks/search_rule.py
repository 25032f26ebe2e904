"""How the search's rule was chosen: forward rows by several rules, on the same rays.

    python benchmarks/search_rule.py [--images 1000] [--scan 200] [--out results/search_rule.json]

The variants are written here in plain PyTorch. They share one loop (double while nothing has
flipped, bisect where an estimate leaves the bracket) and differ in how a probe is estimated;
"compiled" is csrc/rule/search.h itself. --scan asks the ray at 400 evenly spaced radii up to twice
the bisection's flip: where the prediction changes once, how many radii agree with float64 bisection
within 2 rtol, and where it changes more often, how many searches end at an earlier or later flip.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from common import load_model, load_test_images, shared_folder
from tqdm.auto import tqdm

import rat_ext
from rat_ext import reference
from rat_ext.search.checked import Options

TOLERANCES = (1e-2, 2.0**-12)
EPS_MIN = 2.0**-24  # of pixels in [0, 1]: smaller steps are rounded away


def earliest(u, gap_u, v, gap_v, y):
    """The earliest root over the classes of the lines through (u, gap_u) and (v, gap_v)."""
    fall = gap_u - gap_v
    root = u[:, None] + gap_u * (v - u)[:, None] / fall
    root = root.where((fall > 0) & (root > 0), torch.inf)
    return root.scatter(1, y[:, None], torch.inf).amin(1)


def straightening(gap_0, gap_v, v, slope, y):
    """c of the factor (1 + c e) that gives the mean gap its known slope at 0."""
    weight = (-gap_0).scatter(1, y[:, None], -torch.inf).softmax(1)
    change = (weight * (gap_v - gap_0).scatter(1, y[:, None], 0)).sum(1)
    c = torch.where(change < 0, -slope / change - 1 / v, 0.0)
    return c.where(1 + c * v > 0, 0)


def rows_of(model, rays, rtol, first=1.0, centred=False, curved=False, stretch=0.0):
    """(N,) rows that a variant takes.

    first: the first probe, in multiples of the linear estimate; None doubles from 1e-6.
    centred: probe half a tolerance beyond the estimate, rather than at it.
    curved: straighten the gaps by the slope at 0, while one end of the line is at 0.
    stretch: while nothing has flipped, go stretch * reach**2 further than the estimate.
    """
    x, direction, z, slope, options = rays
    n, y = len(x), z.argmax(1)
    gap_0 = z.gather(1, y[:, None]) - z
    margin = gap_0.scatter(1, y[:, None], torch.inf).amin(1)
    lower, gap_lower = torch.zeros(n, dtype=z.dtype), gap_0.clone()
    upper, gap_upper = torch.full_like(lower, torch.inf), torch.empty_like(gap_0)
    eps = torch.full_like(lower, 1e-6) if first is None else first * margin / slope
    eps = eps.clamp(EPS_MIN, options.eps_max)
    rows, active = torch.zeros(n, dtype=torch.long), torch.arange(n)
    while len(active):
        a, e = active, eps[active]
        moved = reference.on_ray(x[a], direction[a], e, options)
        logits = torch.cat([model(part) for part in moved.split(250)]).double()
        gap = logits.gather(1, y[a, None]) - logits
        flip = logits.argmax(1) != y[a]
        rows[a] += 1
        upper[a[flip]], gap_upper[a[flip]] = e[flip], gap[flip]
        lower[a[~flip]], gap_lower[a[~flip]] = e[~flip], gap[~flip]
        low, high = lower[a], upper[a]
        floor = low.clamp_min(EPS_MIN)
        closed = torch.where(high.isinf(), low >= options.eps_max, high - floor <= rtol * high)
        active = a = a[~closed]
        low, high, floor = low[~closed], high[~closed], floor[~closed]
        found = high.isfinite()
        bisect = (low + high) / 2
        if first is None:
            eps[a] = bisect.where(found, 2 * low).clamp_max(options.eps_max)
            continue
        u, gap_u = low.where(found, 0), gap_lower[a].where(found[:, None], gap_0[a])
        v, gap_v = high.where(found, low), gap_upper[a].where(found[:, None], gap_lower[a])
        c = torch.zeros_like(u)
        if curved:
            c = straightening(gap_0[a], gap_v, v, slope[a], y[a]).where(u == 0, 0)
        estimate = earliest(u, gap_u, v, gap_v * (1 + c * v)[:, None], y[a])
        reach = (estimate / floor - 1).clamp(0, 2)
        ahead = estimate * (1 + stretch * reach**2)
        step = 0.97 * rtol
        if centred:
            past = torch.where(high - estimate > estimate - low, 0.5, -0.5)
            estimate = estimate * (1 + step * past)
            estimate = estimate.clamp(
                floor / (1 - step), (high * (1 - step)).where(found, torch.inf)
            )
            ahead = ahead * (1 + step / 2)
        inside = (estimate > low) & (estimate < high) & (rows[a] < 12)
        ahead = ahead.clamp(floor / (1 - step), 4 * floor).where(rows[a] < 4, 2 * floor)
        eps[a] = estimate.where(inside, bisect).where(found, ahead).clamp_max(options.eps_max)
    return rows


VARIANTS = {
    "doubling and bisection": {"first": None},
    "lines, from the linear estimate": {},
    "+ half a tolerance past the estimate": {"centred": True},
    "+ straightened by the slope at 0": {"centred": True, "curved": True},
    "+ first step 1.15": {"centred": True, "curved": True, "first": 1.15},
    "+ stretched while nothing has flipped": {
        "centred": True,
        "curved": True,
        "first": 1.15,
        "stretch": 0.5,
    },
}


def rays_of(model, x, options):
    """x, its directions, float64 logits and slopes of the log-odds."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        z = torch.cat([model(part) for part in leaf.split(250)])
        y = z.argmax(1, keepdim=True)
        log_odds = z.gather(1, y) - z.scatter(1, y, -torch.inf).logsumexp(1, keepdim=True)
        (gradient,) = torch.autograd.grad(log_odds.sum(), leaf)
    direction = -gradient.sign()
    moves = ((direction > 0) & (x < options.high)) | ((direction < 0) & (x > options.low))
    slope = (gradient.abs() * moves).flatten(1).sum(1)
    return x, direction, z.detach().double(), slope.double(), options


def summary(rows):
    rows = rows.double()
    return {"mean": rows.mean().item(), "p95": rows.quantile(0.95).item(), "max": int(rows.max())}


def scan(model, x, rtol):
    """What the compiled search returns, against a dense scan of the rays in float64."""
    x, options = x.double(), Options.checked(x.double())
    model = copy.deepcopy(model).double()
    bisection = reference.robust_radius(model, x, rtol=rtol, batch_size=250)
    direction, _, y = reference.fgsm_direction(model, x, 1.0)
    changed = []
    for share in tqdm(torch.linspace(0, 2, 401, dtype=x.dtype)[1:], desc="scan", leave=False):
        eps = (share * bisection).clamp_max(options.eps_max)
        changed.append(model(reference.on_ray(x, direction, eps, options)).argmax(1) != y)
    flips = torch.stack(changed)
    once = (flips[1:] != flips[:-1]).sum(0) <= 1
    result = {"images": len(x), "cross once": int(once.sum()), "probes": {}}
    for probes in (1, 2, 4, 8):
        r = rat_ext.robust_radius(model, x, rtol=rtol, probes=probes, batch_size=250, full=True)
        agree = (r.radius - bisection).abs() <= 2 * rtol * bisection
        agree |= r.radius == bisection
        valid = model(reference.on_ray(x, direction, r.lower, options)).argmax(1) == y
        upper = reference.on_ray(x, direction, r.upper.where(r.found, 0), options)
        valid &= (model(upper).argmax(1) != y) | ~r.found
        result["probes"][probes] = {
            "brackets valid": int(valid.sum()),
            "agree, of those that cross once": int((agree & once).sum()),
            "earlier": int((~agree & (r.radius < bisection)).sum()),
            "later": int((~agree & (r.radius > bisection)).sum()),
            "rows": summary(r.forward_rows)["mean"],
        }
    return result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--images", type=int, default=1000, help="of the test file")
    parser.add_argument("--scan", type=int, default=0, help="images whose rays are scanned")
    parser.add_argument("--compiled-only", action="store_true", help="leave the variants out")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "search_rule.json"
    )
    arguments = parser.parse_args()
    results: dict = {}
    for name in arguments.models:
        model = load_model(arguments.shared, name)
        x, _ = load_test_images(arguments.shared, max(arguments.images, arguments.scan))
        rows: dict = {}
        rays = rays_of(model, x[: arguments.images], Options.checked(x))
        print(f"{name}, {arguments.images} test images: mean, p95 and most rows")
        for rtol in TOLERANCES:
            for variant, options in {} if arguments.compiled_only else VARIANTS.items():
                rows[f"{variant}, {rtol:g}"] = summary(rows_of(model, rays, rtol, **options))
            ours = rat_ext.robust_radius(
                model, x[: arguments.images], rtol=rtol, batch_size=250, full=True
            )
            rows[f"compiled, {rtol:g}"] = summary(ours.forward_rows)
            rows[f"compiled, {rtol:g}"]["worst case"] = ours.worst_case_rows
            rows[f"compiled, {rtol:g}"]["fallbacks"] = ours.search_report.fallback_share
        for label, row in rows.items():
            print(f"  {label:52s} {row['mean']:6.2f} {row['p95']:4.0f} {row['max']:4d}")
        results[name] = {"images": arguments.images, "rows": rows}
        if arguments.scan:
            results[name]["scan"] = scan(model, x[: arguments.scan], 1e-2)
            print(json.dumps(results[name]["scan"], indent=1))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
