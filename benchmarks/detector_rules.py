"""How a detector's threshold rule was chosen: risk exceeded and coverage by several rules.

    python benchmarks/detector_rules.py [--runs 2000] [--out results/detector_rules.json]

Samples are simulated: a confidence that is uniform on (0, 1), and an error with a probability that
depends on it. Each rule takes a threshold from the held-out samples, or refuses; "exceeded" is the
share of runs in which the true risk of its threshold is above the target, which may be delta at
most, and "coverage" the mean share of new samples that is accepted, 0 where it refuses. All rules
but one test whether the risk is at most the target by the exact binomial p-value, which is that of
Clopper and Pearson's bound.
"""

import argparse
import itertools
import json
import math
import os
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from scipy.special import bdtr, xlogy
from tqdm import tqdm

GRID = (np.arange(100_000) + 0.5) / 100_000
SCORES = {
    "steep": lambda u: 0.5 * (1 - u) ** 4,
    "good": lambda u: 0.6 * (1 - u) ** 2,
    "weak": lambda u: 0.16 - 0.13 * u,
    "no ranking, low risk": lambda u: np.full_like(u, 0.03),
    "no ranking, at 0.052": lambda u: np.full_like(u, 0.052),
    "not monotone": lambda u: 0.06 + 0.05 * np.sin(12 * u),
    "confident errors": lambda u: 0.25 * (1 - u) ** 2 + 0.3 * (u > 0.98),
}
"""The probability of an error at each confidence."""
TARGETS, DELTAS, SAMPLES = (0.05, 0.1), (0.1, 0.001), (500, 1000, 2000, 5000, 10_000)
TUNE_SHARE = 0.2


class Held:
    """Held-out samples, most confident first, with the p-value of each count that is accepted."""

    def __init__(self, wrong, target):
        self.accepted = np.arange(1, len(wrong) + 1)
        self.errors, self.target = np.cumsum(wrong), target
        self.p = bdtr(self.errors, self.accepted, target)

    def starts(self, delta, number):
        """Indices from the least count that could do to the largest; none if none could."""
        least, most = math.log(delta / number) / math.log1p(-self.target), len(self.p)
        if least > most:
            return []
        return np.searchsorted(self.accepted, np.linspace(least, most, number))


def several_starts(held, delta, number=None):
    """Delta is shared among starts; from each on to laxer ones until the first that fails."""
    number = number or max(1, math.ceil(math.log2(len(held.p))))
    begins = held.starts(delta, number)
    if not len(begins):
        return 0
    failures = np.append(np.flatnonzero(held.p > delta / number), len(held.p))
    ends = failures[np.searchsorted(failures, begins)]
    return int(max(ends[ends > begins], default=0))


def carried(held, delta, number=None):
    """The same, but a start that is reached by passing all before it adds its share to theirs."""
    number = number or max(1, math.ceil(math.log2(len(held.p))))
    begins = held.starts(delta, number)
    level, accepted = 0.0, 0
    for begin, end in itertools.pairwise([*begins, len(held.p)]):
        level += delta / number
        failures = np.flatnonzero(held.p[begin:end] > level)
        stop = end
        if len(failures):
            stop, level = begin + failures[0], 0.0
        if stop > begin:
            accepted = int(stop)
    return accepted


def strictest_start(held, delta):
    """One start, at the least count that could do, with all of delta."""
    return several_starts(held, delta, 1)


def bonferroni(held, delta, p=None, number=100):
    """Delta is shared among 100 thresholds; the laxest that passes."""
    grid = held.starts(delta, number)
    passed = [index for index in grid if (held.p if p is None else p)[index] <= delta / number]
    return int(max(passed, default=-1)) + 1


def hoeffding_bentkus(held, delta):
    """As `bonferroni`, with the p-value of Learn then Test, which is for any bounded loss."""
    rate = np.minimum(held.errors / held.accepted, held.target)
    divergence = xlogy(rate, rate / held.target)
    divergence += xlogy(1 - rate, (1 - rate) / (1 - held.target))
    p = np.minimum(np.exp(-held.accepted * divergence), math.e * held.p)
    return bonferroni(held, delta, p)


RULES = {
    "several starts": several_starts,
    "several starts, carried on": carried,
    "4 starts, carried on": lambda held, delta: carried(held, delta, 4),
    "strictest start": strictest_start,
    "100 thresholds, exact": bonferroni,
    "100 thresholds, Hoeffding-Bentkus": hoeffding_bentkus,
}
TUNED = "start from a tuning share"


def tuned(confidence, wrong, target, delta, tune):
    """One start with all of delta: where the tuning share hopes for the least p-value."""
    few, most = np.flatnonzero(tune), np.flatnonzero(~tune)
    ratio = len(most) / len(few)
    errors, accepted = np.cumsum(wrong[few]) * ratio, np.arange(1, len(few) + 1) * ratio
    start = confidence[few][np.argmin(bdtr(errors, np.round(accepted).astype(int), target))]
    held, confidence = Held(wrong[most], target), confidence[most]
    begin = int((confidence >= start).sum()) - 1
    if begin < 0:
        return 1.0
    failures = np.append(np.flatnonzero(held.p[begin:] > delta), len(held.p) - begin)
    stop = begin + failures[0]
    return confidence[stop - 1] if failures[0] else 1.0


def simulate(job):
    """What each rule did in the runs of one setting."""
    name, target, samples, runs = job
    rng = np.random.default_rng([list(SCORES).index(name), round(1000 * target), samples])
    risk = np.cumsum(SCORES[name](GRID)[::-1]) / np.arange(1, len(GRID) + 1)
    thresholds = {(rule, delta): [] for rule in [*RULES, TUNED] for delta in DELTAS}
    for _ in range(runs):
        confidence = np.sort(rng.random(samples))[::-1]
        wrong = rng.random(samples) < SCORES[name](confidence)
        held, tune = Held(wrong, target), rng.random(samples) < TUNE_SHARE
        for delta in DELTAS:
            for rule, choose in RULES.items():
                accepted = choose(held, delta)
                thresholds[rule, delta].append(confidence[accepted - 1] if accepted else 1.0)
            thresholds[TUNED, delta].append(tuned(confidence, wrong, target, delta, tune))
    results = []
    for (rule, delta), values in thresholds.items():
        coverage = 1 - np.array(values)
        counts = np.round(coverage * len(GRID)).astype(int)
        exceeded = (counts > 0) & (risk[np.maximum(counts, 1) - 1] > target)
        results.append(
            {
                "score": name,
                "target": target,
                "samples": samples,
                "delta": delta,
                "rule": rule,
                "exceeded": float(exceeded.mean()),
                "refused": float((coverage == 0).mean()),
                "coverage": float(coverage.mean()),
                "best": float(np.flatnonzero(risk <= target).max(initial=-1) + 1) / len(GRID),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    jobs = [
        (name, target, samples, arguments.runs)
        for samples in sorted(arguments.samples, reverse=True)
        for name in SCORES
        for target in TARGETS
    ]
    with Pool(arguments.processes) as pool:
        done = tqdm(pool.imap_unordered(simulate, jobs), total=len(jobs), desc="settings")
        results = list(itertools.chain.from_iterable(done))
    feasible = [r for r in results if r["best"]]
    print(f"{'rule':34s} delta   exceeded (most)  refused  coverage, by held-out samples")
    for delta in DELTAS:
        for rule in [*RULES, TUNED]:
            mine = [r for r in results if (r["rule"], r["delta"]) == (rule, delta)]
            could = [r for r in feasible if (r["rule"], r["delta"]) == (rule, delta)]
            by_samples = [
                np.mean([r["coverage"] for r in could if r["samples"] == samples])
                for samples in sorted(arguments.samples)
            ]
            print(
                f"{rule:34s} {delta:<6g} {max(r['exceeded'] for r in mine):12.4f}"
                f"{np.mean([r['refused'] for r in could]):12.3f}   "
                + "  ".join(f"{100 * value:5.1f} %" for value in by_samples)
            )
    if arguments.out:
        results.sort(key=lambda r: [str(r[key]) for key in ("score", "target", "samples")])
        lines = ",\n".join(map(json.dumps, results))
        settings = json.dumps({"runs": arguments.runs, "tune_share": TUNE_SHARE})
        text = f'{{"settings": {settings}, "results": [\n{lines}\n]}}\n'
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
