"""What a bound model refuses, and what binding leaves as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import RowExact, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import (
    Detector,
    RATLoss,
    reference,
    robust_radii,
    robust_radius,
    scores,
    with_arguments,
)
from rat_ext._common import user_model
from rat_ext._common.per_sample import Arguments


class Scaled(nn.Module):
    """A classifier that takes a scale for each sample, and a table for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RowExact()

    def forward(self, x: Tensor, scale: Tensor, table: Tensor | None = None) -> Tensor:
        z = self.net(x * scale[:, None])
        return z if table is None else z + table


N = 17
X, TARGET = uniform(N, 12), torch.arange(N) % 4
SCALE = 0.2 + 2 * uniform(N, 1, seed=5).squeeze(1)


@settings(deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    ),
    st.integers(1, 9),
)
def test_what_is_shared_stays_so_whatever_rows_are_chosen(sizes, shared):
    n, rows = sizes
    given = {"each": torch.arange(n), "all": torch.arange(shared), "none": None, "number": 3}
    whole = Arguments.checked(given, n)
    twice = whole.of(torch.tensor(rows)).of(slice(0, len(rows)))
    assert twice.samples == len(rows)
    assert twice.per_sample["each"].tolist() == rows
    expected = rows if shared == n else list(range(shared))
    assert {**twice.per_sample, **twice.shared}["all"].tolist() == expected
    assert (twice.shared["none"], twice.shared["number"]) == (None, 3)


def test_a_table_as_long_as_a_part_of_the_batch_is_no_argument_of_each():
    table = torch.linspace(-1, 1, 4).double()
    arguments = {"scale": SCALE, "table": table}
    whole = reference.robust_radius(Scaled(), X, model_kwargs=arguments, rtol=1e-6)
    chunks = reference.robust_radius(
        Scaled(), X, model_kwargs=arguments, rtol=1e-6, batch_size=len(table)
    )
    assert torch.equal(whole, chunks)
    bound = with_arguments(Scaled(), X, arguments).of(slice(4, 8))
    radii = robust_radius(bound, X[4:8], rtol=1e-6)
    torch.testing.assert_close(radii, whole[4:8], rtol=1e-6, atol=0)
    # The split of a detector gives parts of any length, here also that of the table.
    loader = [(X, TARGET, arguments)] * 20
    Detector.fit(Scaled(), loader, "odin", coverage=0.5, tune_share=0.2, progress=False)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_model_bound_to_another_batch_is_refused(batch_size):
    bound = with_arguments(Scaled(), X, {"scale": SCALE})
    for radius in (robust_radius, reference.robust_radius):
        with pytest.raises(ValueError, match="called with 4 inputs, and has arguments for 17"):
            radius(bound, X[5:9], batch_size=batch_size)


@pytest.mark.parametrize("expensive", ["rr-bs", "energy"])
def test_a_cascade_gives_the_expensive_score_the_arguments_of_its_rows(expensive):
    score = scores.get(expensive, temperature=1.0)
    bound = with_arguments(Scaled(), X, {"scale": SCALE})
    cheap, alone = scores.get("msr").score(bound, X), score.score(bound, X)
    cascade = scores.Cascade("msr", score)
    cascade.band = tuple(cheap.quantile(torch.tensor([0.3, 0.7]).double()).tolist())
    within = (cheap >= cascade.band[0]) & (cheap <= cascade.band[1])
    assert 0 < within.sum() < N
    confidence = cascade.score(bound, X)[within]
    torch.testing.assert_close(confidence, alone[within].to(confidence), rtol=1e-9, atol=0)


@pytest.mark.parametrize("pair", [(SCALE, 1), [SCALE], {"a": SCALE}, ([SCALE],)], ids=range(4))
def test_tensors_that_would_not_follow_their_samples_are_refused(pair):
    with pytest.raises(TypeError, match=r"pair of model_kwargs.* of tensors.*a name of its own"):
        robust_radius(Scaled(), X, model_kwargs={"scale": SCALE, "pair": pair})


@pytest.mark.parametrize("name", ["msr", "odin", "rr-bs"])
def test_arguments_made_in_inference_mode(name):
    options = {"perturbation": 0.01} if name == "odin" else {}
    score = scores.get(name, **({} if name == "msr" else {"temperature": 1.0}), **options)
    model = Scaled()
    expected = score.score(with_arguments(model, X, {"scale": SCALE}), X)
    with torch.inference_mode():
        bound = with_arguments(model, X, {"scale": SCALE * 1})
        assert torch.equal(score.score(bound, X), expected)


def test_no_gradient_goes_to_the_arguments():
    scale = SCALE.clone().requires_grad_()
    RATLoss(0.01)(Scaled(), X, TARGET, model_kwargs={"scale": scale}).loss.backward()
    assert scale.grad is None
    assert not robust_radius(Scaled(), X, model_kwargs={"scale": scale}).requires_grad


def test_the_loss_is_that_of_the_reference():
    ours, theirs = Scaled(), Scaled()
    loss = RATLoss(0.01)(ours, X, TARGET, model_kwargs={"scale": SCALE}).loss
    loss.backward()
    bound = with_arguments(theirs, X, {"scale": SCALE})
    expected = reference.rat_loss(bound, X, TARGET, eps=0.01)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_model_in_eval_mode_keeps_no_other_thread_waiting():
    free = []

    class Looks(Scaled):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            thread = threading.Thread(target=self.look)
            thread.start()
            thread.join()
            return super().forward(x, scale)

        def look(self) -> None:
            if taken := user_model._CHANGING.acquire(blocking=False):
                user_model._CHANGING.release()
            free.append(taken)

    robust_radius(Looks().eval(), X, model_kwargs={"scale": SCALE})
    assert free
    assert all(free)


def test_a_run_with_other_arguments_is_not_gone_on_with(tmp_path):
    def loader(scale: Tensor) -> torch.utils.data.DataLoader:
        rows = list(zip(X, TARGET, scale, strict=True))
        return torch.utils.data.DataLoader(rows, batch_size=5)

    run = {
        "out": tmp_path / "run",
        "progress": False,
        "batch_fn": lambda batch: (batch[0], batch[1], {"scale": batch[2]}),
    }
    robust_radii(Scaled(), loader(SCALE), **run)
    robust_radii(Scaled(), loader(SCALE), resume=True, **run)
    with pytest.raises(ValueError, match="first batch has other inputs"):
        robust_radii(Scaled(), loader(SCALE + 1), resume=True, **run)
