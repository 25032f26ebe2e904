"""What the service tells of its answers: digits, and the distribution of radii and confidences."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
import torch
from helpers import RowExact, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import get, post, service
from service import Brightness, metrics_in, npy
from torch import Tensor, nn

import rat_ext
from rat_ext import Detector
from rat_ext.serve import Settings
from rat_ext.serve.gate import Answer
from rat_ext.serve.monitoring import Metrics


def test_a_confidence_near_1_keeps_its_digits() -> None:
    def sure(x: Tensor) -> Any:
        confidence, probability = (x.new_full((len(x),), 1 - e) for e in (2**-53, 1e-5))
        return SimpleNamespace(
            prediction=torch.zeros(len(x), dtype=torch.int64),
            confidence=confidence,
            probability=probability,
            accepted=confidence > 0,
        )

    with service(mlp(), detector=sure) as app:
        (response,) = post(app, npy(uniform(12)))
    assert '"confidence":0.9999999999999999,"probability":0.99999,' in response.text


class Confident(nn.Module):
    """Its softmax is 1 in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([10 + x.sum(1), -10 - x.sum(1)], 1)


def test_the_confidence_of_a_softmax_is_not_rounded_to_1() -> None:
    model = Confident()
    loader = [(uniform(50, 12, dtype=torch.float32) / 100, torch.arange(50) % 2)]
    detector = Detector.fit(model, loader, "msr", coverage=0.5, progress=False)
    with service(model, dtype=torch.float32, detector=detector) as app:
        (response,) = post(app, npy(np.zeros(12)))
    assert 0 < 1 - response.json()["confidence"] < 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*2 * [st.floats(-1e3, 1e3) | st.just(math.inf) | st.none()])))
def test_histograms_of_radii_and_confidences(values: list[tuple[float | None, ...]]) -> None:
    metrics = Metrics(Settings(), (0.0, 2.0))
    for radius, confidence in values:
        metrics.observe(Answer(0, radius=radius and abs(radius), confidence=confidence))
    counts = metrics_in(prometheus_client.generate_latest(metrics.registry).decode())
    for name, seen in [
        ("radius", [abs(r) for r, _ in values if r not in (None, math.inf)]),
        ("confidence", [c for _, c in values if c is not None]),
    ]:
        found = re.compile(rf'rat_ext_{name}_bucket{{le="(.*)"}}')
        buckets = {float(m[1]): counts[m[0]] for m in map(found.fullmatch, counts) if m}
        assert buckets == {edge: sum(value <= edge for value in seen) for edge in buckets}
        assert list(buckets) == sorted(buckets)
        edges = np.array(list(buckets)[:-1])
        if name == "radius":
            assert counts["rat_ext_radius_sum"] == pytest.approx(sum(seen))
            np.testing.assert_allclose(edges[1:] / edges[:-1], 10**0.5)
            assert edges[-1] == 2.0  # no radius is larger than the width of the bounds
        else:
            assert {0.0, 0.1, 0.9, 0.99, 0.99999, -1.0, 100.0} <= set(edges)


def test_answers_are_in_the_histograms() -> None:
    model, x = RowExact(), uniform(6, 12)
    with service(model, detector=Brightness(model)) as app:
        assert post(app, npy(x), path="/predict-batch")[0].status_code == 200
        counts = metrics_in(get(app, "/metrics").text)
    radii = rat_ext.robust_radius(model, x)
    assert counts["rat_ext_radius_sum"] == pytest.approx(radii.sum().item())
    assert counts['rat_ext_radius_bucket{le="0.1"}'] == (radii <= 0.1).sum()
    assert counts['rat_ext_confidence_bucket{le="+Inf"}'] == 6
    assert counts['rat_ext_confidence_bucket{le="0.1"}'] == (x.mean(1) <= 0.1).sum()
