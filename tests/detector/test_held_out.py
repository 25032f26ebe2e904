"""What is fitted on which of the held-out samples, and the loaders that will do."""

from __future__ import annotations

import pytest
import torch
from detector_helpers import FAST, fit, loader
from helpers import RowExact
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rat_ext import Detector, scores
from rat_ext.detector.held_out import Split


def test_a_score_is_fitted_on_other_samples_than_the_threshold() -> None:
    seen: dict[str, list[float]] = {"fit": [], "score": []}

    class Spy(scores.LogitScore):
        def fit(self, model, loader, *, progress=True):
            for x, _ in loader:
                seen["fit"] += x[:, 0].tolist()
            return self

        def score(self, model, x):
            return self.score_and_predict(model, x)[0]

        def score_and_predict(self, model, x):
            seen["score"] += x[:, 0].tolist()
            return super().score_and_predict(model, x)

        def score_logits(self, logits):
            return logits.amax(1)

    x = torch.arange(400.0).div(400)[:, None].expand(400, 12).double()
    target = torch.arange(400) % 4
    data = DataLoader(TensorDataset(x, target), batch_size=30)
    report = Detector.fit(
        RowExact(), data, Spy(), coverage=0.5, tune_share=0.3, progress=False
    ).report
    assert sorted(seen["fit"] + seen["score"]) == x[:, 0].tolist()
    assert (len(seen["fit"]), len(seen["score"])) == (report.tuned_on, report.samples)
    assert 80 < report.tuned_on < 160  # of 400, each with probability 0.3


def test_all_samples_choose_the_threshold_of_a_fitted_score() -> None:
    score = scores.get("rr-fast").fit(RowExact(), loader(seed=3), progress=False)
    for fitted in (score, scores.get("rr-fast", **FAST), "msr"):
        assert fit(fitted).report.samples == 400
    unfitted = scores.get("rr-fast")
    detector = fit(unfitted)
    assert detector.report.samples + detector.report.tuned_on == 400
    assert detector.report.tuned_on > 40
    assert unfitted.needs_fit  # it was copied
    assert not detector.score.needs_fit


def test_both_parts_of_sorted_data_have_all_classes() -> None:
    target = torch.arange(10).repeat_interleave(100)
    split = Split([(torch.rand(50, 2), part) for part in target.split(50)], 0.2, 0)
    for part in (split.tune, split.rest):
        counts = torch.cat([targets for _, targets in part]).bincount(minlength=10)
        assert len(counts) == 10
        assert counts.min() >= 5


class Augmented(Dataset):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(12, dtype=torch.float64), 0


def test_loaders_whose_passes_differ() -> None:
    shuffled = loader(shuffle=True)
    for data, message in [
        (shuffled, "the loader shuffles"),
        (iter(loader()), "the loader is an iterator"),
        (DataLoader(Augmented(), batch_size=20), "the loader's passes differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            Detector.fit(RowExact(), data, "rr-fast", coverage=0.5, progress=False)
        if data is not shuffled:
            continue
        assert Detector.fit(RowExact(), data, "msr", coverage=0.5, progress=False)

    class Shorter(list):
        def __iter__(self):
            self.pop()
            return super().__iter__()

    with pytest.raises(ValueError, match="the loader's passes differ"):
        list(map(list, [(split := Split(Shorter(loader()), 0.5, 0)).tune, split.rest]))
