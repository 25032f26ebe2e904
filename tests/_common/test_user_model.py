"""A user's model is left as it was, also if several threads run it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import rat_ext
from rat_ext._common.user_model import undisturbed

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
THREADS, CALLS = 3, 60


def network(training: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)
        )
        model(torch.rand(50, 6))  # statistics that are not those of a new module
    return model.train(training)


def inputs() -> Tensor:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(1))


def in_threads(call: Callable[[int], Tensor]) -> list[Tensor]:
    """What each of all the calls returned, made by several threads that begin together."""
    together = threading.Barrier(THREADS)

    def work(thread: int) -> list[Tensor]:
        together.wait()
        return [call(thread) for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return [result for results in pool.map(work, range(THREADS)) for result in results]


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [module.training for module in model.modules()], torch.get_rng_state()


def assert_as_before(model: nn.Module, before: tuple[dict[str, Tensor], list[bool], Tensor]):
    state, flags, random_state = state_of(model)
    for name, value in before[0].items():
        assert torch.equal(state[name], value), name
    assert flags == before[1]
    assert torch.equal(random_state, before[2])


@pytest.mark.parametrize("training", [True, False])
def test_threads_share_a_model(training: bool) -> None:
    model, x = network(training), inputs()
    expected = rat_ext.robust_radius(model, x)
    before = state_of(model)
    results = in_threads(lambda _: rat_ext.robust_radius(model, x))
    assert sum(not torch.equal(result, expected) for result in results) == 0
    assert_as_before(model, before)


def test_threads_have_wrappers_of_one_network() -> None:
    network_, x = network(training=True), inputs()
    wrappers = [nn.Sequential(network_), nn.Sequential(network_, nn.Identity()), network_]
    wrappers[0].training = False  # as a wrapper that was made for inference
    expected = rat_ext.robust_radius(network_, x)
    before = [state_of(wrapper) for wrapper in wrappers]
    results = in_threads(lambda thread: rat_ext.robust_radius(wrappers[thread], x))
    assert sum(not torch.equal(result, expected) for result in results) == 0
    for wrapper, state in zip(wrappers, before, strict=True):
        assert_as_before(wrapper, state)


def test_threads_share_a_model_with_estimators_and_scores() -> None:
    model, x = network(training=True), inputs()
    estimator = rat_ext.RadiusEstimator(model, x)
    ways: list[Callable[[], Tensor]] = [
        lambda: estimator(x).radius,
        lambda: rat_ext.RadiusEstimator(model, x)(x).radius,
        lambda: rat_ext.scores.MSR().score(model, x),
    ]
    expected = [way() for way in ways]
    before = state_of(model)
    results = in_threads(lambda thread: ways[thread]())  # first those of the first thread
    assert sum(not torch.equal(r, expected[i // CALLS]) for i, r in enumerate(results)) == 0
    assert_as_before(model, before)


def test_threads_whose_models_fail() -> None:
    model, x = network(training=True), inputs()
    expected = rat_ext.robust_radius(model, x)
    before = state_of(model)

    def call(thread: int) -> Tensor:
        if thread:
            return rat_ext.robust_radius(model, x)
        with pytest.raises(RuntimeError, match="shapes"):
            rat_ext.robust_radius(model, x[:, :5])
        return expected

    assert sum(not torch.equal(result, expected) for result in in_threads(call)) == 0
    assert_as_before(model, before)


def test_models_in_eval_mode_run_side_by_side() -> None:
    """Each waits for the others in the middle of its forward."""
    together = threading.Barrier(THREADS)

    class Meeting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            together.wait(timeout=60)
            return x

    model = nn.Sequential(nn.Linear(6, 3), Meeting()).eval()

    def run(_: int) -> Tensor:
        with undisturbed(model, CPU), torch.no_grad():
            return model(inputs())

    with ThreadPoolExecutor(THREADS) as pool:
        first, *others = pool.map(run, range(THREADS))
    assert all(torch.equal(first, other) for other in others)


def test_a_run_within_a_run() -> None:
    outer, inner = network(training=True), network(training=True)
    before = [state_of(model) for model in (outer, inner)]
    with undisturbed(outer, CPU):
        for model in (outer, inner):
            with undisturbed(model, CPU):
                assert not any(module.training for module in model.modules())
        assert not any(module.training for module in outer.modules())
        assert all(module.training for module in inner.modules())
    for model, state in zip((outer, inner), before, strict=True):
        assert_as_before(model, state)


def test_a_flag_that_cannot_be_set_leaves_the_others() -> None:
    class Stubborn(nn.Module):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "training" and value is False:
                raise RuntimeError("this module is always in training mode")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Dropout(), Stubborn(), nn.Dropout())
    with pytest.raises(RuntimeError, match="always in training mode"), undisturbed(model, CPU):
        pass
    assert all(module.training for module in model.modules())
    with ThreadPoolExecutor(1) as pool:  # nobody holds the lock any more
        pool.submit(rat_ext.robust_radius, network(training=True), inputs()).result(timeout=60)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_frozen_torchscript_has_no_mode() -> None:
    model, x = network(training=False), inputs()
    frozen = torch.jit.freeze(torch.jit.script(model))
    assert not hasattr(frozen, "training")
    expected = rat_ext.robust_radius(model, x)
    torch.testing.assert_close(rat_ext.robust_radius(frozen, x), expected)
    torch.testing.assert_close(rat_ext.RadiusEstimator(frozen, x)(x).radius, expected)
    within = nn.Sequential(nn.Dropout(), frozen)
    torch.testing.assert_close(rat_ext.robust_radius(within, x), expected)
    assert within.training


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_in_training_mode() -> None:
    model, x = network(training=True), inputs()
    scripted = torch.jit.script(model)
    before = state_of(scripted)
    expected = rat_ext.robust_radius(model, x)
    torch.testing.assert_close(rat_ext.robust_radius(scripted, x), expected)
    assert_as_before(scripted, before)
