"""The standing trial finds nothing wrong, and finds what is made wrong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rat_ext

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SOME = [40, 44, 47, 50, 52, 53, 56, 57, 58, 61]
"""Seeds of nets of which some show each of the faults that are planted here."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trials():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import trials
    finally:
        sys.path.remove(str(BENCHMARKS))
    return trials


@pytest.fixture(autouse=True)
def random_state():
    """The trial sets the seed."""
    with torch.random.fork_rng(devices=[]):
        yield


def test_random_nets_show_nothing_wrong(trials):
    said = []
    tally, failing = trials.trial(range(200), ["plain", "wide", "half"], report=said.append)
    assert not failing, "\n".join(said)
    assert tally.nets == 200
    assert tally.checks > 10_000
    # What rounding excuses is rare, or the checks would mean little.
    assert sum(tally.at_rounding.values()) < tally.checks / 1000


def test_a_seed_stands_for_one_net(trials):
    first, again = (trials.Case(3, "plain") for _ in range(2))
    assert str(first) == str(again)
    assert first.x.equal(again.x)
    assert trials.same(trials.state_of(first.net)[1:], trials.state_of(again.net)[1:])


def too_far(result, *_):
    return replace(result, lower=result.upper * 1.5, upper=result.upper * 1.5)


def too_near(result, *_):
    return replace(result, lower=result.lower * 0.5, upper=result.lower * 0.5)


def wide_bracket(result, *_):
    return replace(result, lower=result.lower * 0.4)


def nothing_found(result, *_):
    lost = torch.full_like(result.radius, torch.inf)
    return replace(result, radius=lost, upper=lost, found=result.found & False)


def other_class(result, *_):
    return replace(result, flipped_to=(result.flipped_to + 1).where(result.found, -1))


def other_prediction(result, *_):
    return replace(result, prediction=1 - result.prediction.clamp_max(1))


def other_radius(result, *_):
    return replace(result, radius=result.radius * 1.01)


def too_dear(result, *_):
    return replace(result, forward_rows=result.forward_rows + 10_000)


def no_row(result, *_):
    return replace(result, radius=result.radius * torch.nan)


def leaves_training(result, model):
    model.train(not model.training)
    return result


def leaves_gradients(result, model):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    return result


def leaves_weights(result, model):
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    return result


def draws_numbers(result, _):
    torch.rand(1)
    return result


def raises(*_):
    raise ValueError("planted")


def depends_on_the_batch(result, *_):
    factor = 1.0 + 0.3 * torch.linspace(0, 1, len(result.radius), dtype=result.radius.dtype)
    return replace(result, **{n: getattr(result, n) * factor for n in ("radius", "lower", "upper")})


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        (too_far, {"lower", "crossing", "off", "reference"}),
        (too_near, {"upper", "flipped_to"}),
        (wide_bracket, {"tolerance"}),
        (nothing_found, {"not found", "end"}),
        (other_class, {"flipped_to"}),
        (other_prediction, {"prediction"}),
        (other_radius, {"radius", "fast"}),
        (too_dear, {"forward rows"}),
        (no_row, {"nan"}),
        (leaves_training, {"model left as it was"}),
        (leaves_gradients, {"model left as it was"}),
        (leaves_weights, {"model left as it was"}),
        (draws_numbers, {"model left as it was"}),
        (raises, {"error"}),
        (depends_on_the_batch, {"batching"}),
    ],
)
def test_planted_faults_are_reported(trials, monkeypatch, fault, found_by):
    right = rat_ext.robust_radius

    def wrong(model, x, **options):
        return fault(right(model, x, **options), model)

    monkeypatch.setattr(rat_ext, "robust_radius", wrong)
    tally, failing = trials.trial(SOME, ["plain"], report=lambda _: None)
    assert found_by <= (+tally.wrong).keys()
    assert failing


def test_a_ray_in_another_direction_is_reported(trials, monkeypatch):
    import trial_rays

    right = trial_rays.BracketSearch.head

    def wrong(search, gradient, begin):
        right(search, -gradient, begin)

    monkeypatch.setattr(trial_rays.BracketSearch, "head", wrong)
    tally, _ = trials.trial(SOME, ["plain"], report=lambda _: None)
    assert tally.wrong["direction"] > 0


def test_a_failing_net_is_named_with_its_options(trials, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rat_ext, "robust_radius", raises)
    threads = torch.get_num_threads()
    out = tmp_path / "trials.json"
    assert trials.main(["--only", "5", "--kinds", "plain", "--out", str(out)]) == 1
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "--only 5 --kinds plain" in said
    assert "'bounds'" in said
    assert '"error"' in out.read_text()
