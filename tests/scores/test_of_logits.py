"""Scores of the logits, and at perturbed inputs, against their papers' formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_helpers import CLASSES, PERTURBED, Counting, inputs, make, softmax

from rat_ext import scores

NAIVE = {
    "msr": lambda z, t: softmax(z).amax(1),
    "max-logit": lambda z, t: z.amax(1),
    "margin": lambda z, t: z.sort(1).values[:, -1] - z.sort(1).values[:, -2],
    "negative-entropy": lambda z, t: (softmax(z) * softmax(z).log()).sum(1),
    "energy": lambda z, t: t * (z / t).exp().sum(1).log(),
    "odin": lambda z, t: softmax(z, t).amax(1),
    "doctor-alpha": lambda z, t: -(1 / softmax(z, t).square().sum(1) - 1),
    "doctor-beta": lambda z, t: -(1 / softmax(z, t).amax(1) - 1),
}
# What a score gives, on the scale of its paper.
SCALE = {
    "odin": torch.sigmoid,
    "doctor-alpha": lambda s: -(-s).exp(),
    "doctor-beta": lambda s: -(-s).exp(),
}


@pytest.mark.parametrize("name", NAIVE)
@settings(deadline=None)
@given(data=st.data())
def test_values_are_those_of_the_formula(name, data):
    rows = data.draw(st.integers(1, 3))
    classes = data.draw(st.integers(2, 5))
    values = st.floats(-6, 6).map(lambda value: round(value, 2))
    logits = torch.tensor(
        data.draw(st.lists(values, min_size=rows * classes, max_size=rows * classes)),
        dtype=torch.float64,
    ).view(rows, classes)
    options = {}
    temperature = 1.0
    if name in ("energy", "odin", "doctor-alpha", "doctor-beta"):
        options["temperature"] = temperature = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    if name == "odin":
        options["perturbation"] = 0.0
    got = SCALE.get(name, lambda s: s)(scores.get(name, **options).score_logits(logits))
    torch.testing.assert_close(got, NAIVE[name](logits, temperature), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("msr", *PERTURBED, "rel-u")),
        *((name, {"temperature": 0.2}) for name in PERTURBED),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_predictions_are_not_tied(name, options, dtype):
    # In float32 the softmax of all of these is 1.
    logits = torch.zeros(8, CLASSES, dtype=dtype)
    logits[:, 1] = torch.arange(20, 28)
    assert (logits.float().softmax(1).amax(1) == 1).all()
    confidence = make(name, **options).score_logits(logits)
    assert (confidence.diff() > 0).all()


def finite_difference(function, x, h=1e-6):
    """d function(x)[i] / d x[i], for a function of rows."""
    gradient = torch.empty_like(x)
    for j in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, j] = h
        gradient[:, j] = (function(x + step) - function(x - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        # The papers write x - eps * sign(-grad objective).
        ("odin", lambda z, t: softmax(z, t).amax(1).log()),
        ("doctor-alpha", lambda z, t: (1 / softmax(z, t).square().sum(1) - 1).log()),
        ("doctor-beta", lambda z, t: (1 / softmax(z, t).amax(1) - 1).log()),
    ],
)
def test_perturbed_scores_follow_their_papers(name, objective):
    model, x, t, eps = Counting().eval(), inputs(), 1.5, 0.02
    with torch.no_grad():
        gradient = finite_difference(lambda x: objective(model(x), t), x)
        assert gradient.abs().min() > 1e-5  # so that its sign is certain
        perturbed = (x - eps * (-gradient).sign()).clamp(0, 1)
        expected = NAIVE[name](model(perturbed), t)
        unperturbed = NAIVE[name](model(x), t)
    got = SCALE[name](make(name, temperature=t, perturbation=eps).score(model, x))
    torch.testing.assert_close(got, expected)
    raised = (got > unperturbed).double().mean()  # but for a few rows that change their prediction
    assert raised > 0.9 if name == "odin" else raised < 0.1


@pytest.mark.parametrize("name", PERTURBED)
def test_perturbed_inputs_stay_in_bounds(name):
    model = Counting()
    x = inputs().round()  # every element at a bound
    make(name, perturbation=0.3).score(model, x)
    perturbed = model.seen[-1]
    assert perturbed.min() == 0
    assert perturbed.max() == 1
    assert set(perturbed.sub(x).abs().unique().tolist()) <= {0.0, 0.3, 1 - 0.7}
    make(name, perturbation=0.3, bounds=(-1, 2)).score(model, x)
    assert model.seen[-1].sub(x).abs().min() == pytest.approx(0.3)


@pytest.mark.parametrize("name", PERTURBED)
def test_the_direction_is_right_in_float32_where_the_model_is_confident(name):
    score = make(name, temperature=0.5, perturbation=0.01)
    points = []
    for dtype in (torch.float32, torch.float64):
        model = Counting(scale=10.0, dtype=dtype)
        x = inputs(200, torch.float32).to(dtype)
        score.score(model, x)
        points.append((model.seen[-1] - x).sign().double())
    confident = (Counting(scale=10.0).eval()(x) / 0.5).softmax(1).amax(1).float() == 1
    assert confident.sum() > 50
    assert (points[0] == points[1]).double().mean() > 0.999
