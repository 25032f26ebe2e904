"""The scores against their papers' formulas, written naively, and against the protocol."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rat_ext.radius_scores
from rat_ext import metrics, robust_radius, scores
from rat_ext.scores import registry

BUILT_IN = [
    "msr",
    "max-logit",
    "margin",
    "negative-entropy",
    "energy",
    "odin",
    "doctor-alpha",
    "doctor-beta",
    "rel-u",
    "rr-bs",
    "rr-fast",
]
CLASSES, FEATURES = 4, 6


class Counting(nn.Module):
    """A small classifier in train mode, with buffers and randomness that a score must not touch."""

    def __init__(self, scale=1.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 16),
            nn.BatchNorm1d(16),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(16, CLASSES),
        ).to(dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.scale = scale
        self.rows = 0
        self.seen = []

    def forward(self, x):
        self.rows += len(x)
        self.seen.append(x.detach())
        return self.scale * self.layers(x)


def inputs(n=40, dtype=torch.float64):
    return torch.rand(n, FEATURES, dtype=dtype, generator=torch.Generator().manual_seed(7))


def held_out(n=60, batch_size=25, dtype=torch.float64):
    """A loader of inputs whose targets are the predictions of `Counting`, a third of them wrong."""
    x = inputs(n, dtype)
    target = Counting(dtype=dtype).eval()(x).argmax(1)
    target[::3] = (target[::3] + 1) % CLASSES
    return DataLoader(TensorDataset(x, target), batch_size=batch_size)


def make(name, **options):
    """A score at a single setting, fitted if it must be."""
    if name in ("odin", "doctor-alpha", "doctor-beta"):
        options = {"temperature": 1.5, "perturbation": 0.01, **options}
    if name in ("rel-u", "rr-bs", "rr-fast"):
        options = {"temperature": 1.5, **options}
    score = scores.get(name, **options)
    return score.fit(Counting(), held_out(), progress=False) if name == "rel-u" else score


# Values


def softmax(logits, temperature=1.0):
    return torch.from_numpy(
        np.stack([np.exp(row) / np.exp(row).sum() for row in logits.numpy() / temperature])
    )


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
    ("name", "value"),
    [
        ("msr", 0.7),
        ("max-logit", math.log(0.7)),
        ("margin", math.log(3.5)),
        ("negative-entropy", 0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)),
        ("energy", 0.0),
        ("odin", math.log(7 / 3)),
        ("doctor-alpha", math.log(0.54 / 0.46)),
        ("doctor-beta", math.log(7 / 3)),
    ],
)
def test_values_by_hand(name, value):
    options = {"temperature": 1.0} if name in ("odin", "doctor-alpha", "doctor-beta") else {}
    options |= {"perturbation": 0.0} if name == "odin" else {}
    logits = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64).log()
    assert scores.get(name, **options).score_logits(logits).item() == pytest.approx(value)


@pytest.mark.parametrize("name", ["msr", "odin", "doctor-alpha", "doctor-beta", "rel-u"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_predictions_are_not_tied(name, dtype):
    # In float32 the softmax of all of these is 1.
    logits = torch.zeros(8, CLASSES, dtype=dtype)
    logits[:, 1] = torch.arange(20, 28)
    assert (logits.float().softmax(1).amax(1) == 1).all()
    confidence = make(name).score_logits(logits)
    assert (confidence.diff() > 0).all()


def test_low_temperatures_do_not_saturate():
    logits = torch.zeros(8, CLASSES)
    logits[:, 1] = torch.arange(20, 28)
    for name in ("odin", "doctor-alpha", "doctor-beta"):
        assert (make(name, temperature=0.2).score_logits(logits).diff() > 0).all()


# Perturbed inputs


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


@pytest.mark.parametrize("name", ["odin", "doctor-alpha", "doctor-beta"])
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


@pytest.mark.parametrize("name", ["odin", "doctor-alpha", "doctor-beta"])
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


# fit()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("energy", {}),
        ("odin", {"perturbation": [0.0, 0.05, 0.1]}),
        ("doctor-alpha", {"perturbation": [0.1, 0.0]}),
        ("rr-bs", {}),
        ("rr-fast", {"h": 1e-2}),
    ],
)
def test_fit_chooses_the_setting_with_the_smallest_aurc(name, options):
    model, loader = Counting(scale=0.2), held_out()
    temperatures = [0.1, 1.0, 10.0]
    fitted = scores.get(name, temperature=temperatures, **options)
    assert fitted.fit(model, loader, progress=False) is fitted
    x, target = loader.dataset.tensors
    correct = Counting().eval()(x).argmax(1) == target
    aurcs = {}
    perturbations = options.pop("perturbation", [0.0])
    for temperature in temperatures:
        for perturbation in perturbations:
            single = {"temperature": temperature, **options}
            if perturbations != [0.0]:
                single["perturbation"] = perturbation
            confidence = scores.get(name, **single).score(model, x)
            aurcs[temperature, perturbation] = metrics.aurc(confidence, correct)
    assert len(set(aurcs.values())) > 1
    assert fitted.validation_aurc == pytest.approx(aurcs)
    assert fitted.setting == min(aurcs, key=aurcs.get)
    assert (fitted.temperature, fitted.perturbation) == fitted.setting


def test_fit_shares_forwards_among_the_settings():
    model = Counting()
    score = scores.get("odin", temperature=[0.5, 1.0, 2.0], perturbation=[0.0, 0.1, 0.2])
    score.fit(model, held_out(60), progress=False)
    assert model.rows == 60 * (1 + 3 * 2)


def test_default_grids_and_single_settings():
    assert len(scores.get("odin").grid) == 15 * 12
    assert len(scores.get("doctor-alpha").grid) == 15
    assert len(scores.get("rr-bs").grid) == 15

    def untouched():
        raise AssertionError("there is nothing to choose")
        yield

    for name in BUILT_IN:
        if name != "rel-u":
            score = make(name)
            assert score.fit(Counting(), untouched()) is score


def relu_matrix(logits, correct, temperature, weight):
    """D by loops over pairs of classes."""
    p = softmax(logits, temperature)
    matrix = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.float64)
    for i in range(logits.shape[1]):
        for j in range(logits.shape[1]):
            if i != j:
                wrong = (p[~correct, i] * p[~correct, j]).mean()
                right = (p[correct, i] * p[correct, j]).mean()
                matrix[i, j] = max(0.0, weight * wrong - (1 - weight) * right)
    return matrix / matrix.norm()


def logits_loader(logits, target, batch_size=16):
    """Logits as inputs, of the model ``lambda x: x``."""
    return DataLoader(TensorDataset(logits, target), batch_size=batch_size)


def confused(n=200):
    """As confident when wrong, between 0 and 1, as when right, where 2 is likelier than 1."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(n, generator=generator) < 0.3
    logits = torch.randn(n, CLASSES, generator=generator, dtype=torch.float64) * 0.1
    logits[:, 0] = 3
    logits[:, 1] = torch.where(wrong, 2.0, 0.0)
    logits[:, 2] = torch.where(wrong, 0.0, 2.0)
    return logits, wrong.long()


def test_relu_learns_which_classes_are_confused():
    logits, target = confused()
    correct = target == 0
    score = scores.get("rel-u", temperature=2.0, weight=0.4)
    score.fit(nn.Identity(), logits_loader(logits, target), progress=False)
    matrix = relu_matrix(logits, correct, 2.0, 0.4)
    torch.testing.assert_close(score.matrix, matrix)
    confidence = score.score(nn.Identity(), logits)
    p = softmax(logits, 2.0)
    torch.testing.assert_close(confidence, torch.stack([-row @ matrix @ row for row in p]))
    assert metrics.auroc(confidence, correct) > 0.99
    assert metrics.auroc(scores.MSR().score_logits(logits), correct) < 0.7


def test_relu_chooses_its_temperature_on_samples_it_did_not_learn_from():
    x, target = held_out(120).dataset.tensors
    logits = Counting().eval()(x).detach()
    correct = logits.argmax(1) == target
    grid = [0.5, 1.0, 5.0]
    score = scores.get("rel-u", temperature=grid)
    score.fit(nn.Identity(), logits_loader(logits, target), progress=False)
    aurcs = {}
    for temperature in grid:
        matrix = relu_matrix(logits[::2], correct[::2], temperature, 0.5)
        p = softmax(logits[1::2], temperature)
        aurcs[temperature, 0.0] = metrics.aurc(-((p @ matrix) * p).sum(1), correct[1::2])
    assert len(set(aurcs.values())) > 1
    assert score.validation_aurc == pytest.approx(aurcs)
    assert score.setting == min(aurcs, key=aurcs.get)
    torch.testing.assert_close(score.matrix, relu_matrix(logits, correct, score.temperature, 0.5))


def test_relu_without_a_pattern_is_the_gini_index():
    logits, target = confused()
    score = scores.get("rel-u", temperature=1.0, weight=0.0)
    confidence = score.fit(nn.Identity(), logits_loader(logits, target), progress=False).score(
        nn.Identity(), logits
    )
    gini = 1 - softmax(logits).square().sum(1)
    torch.testing.assert_close(confidence, -gini / math.sqrt(CLASSES * (CLASSES - 1)))


# Radii


@pytest.mark.parametrize("method", ["bs", "fast"])
def test_radius_scores_are_radii(method):
    model, x = Counting(), inputs()
    score = scores.get(f"rr-{method}", temperature=0.7, rtol=1e-3)
    result = robust_radius(model, x, method=method, temperature=0.7, rtol=1e-3, full=True)
    assert math.isnan(score.forward_rows)
    assert torch.equal(score.score(model, x), result.radius)
    assert score.forward_rows == 1 + result.forward_rows.double().mean()


def test_an_infinite_radius_is_the_largest_confidence_and_a_tie():
    model, x = Counting(), inputs()
    confidence = scores.get("rr-bs", temperature=1.0, eps_max=0.05).score(model, x)
    assert 0 < confidence.isinf().sum() < len(x)
    share = confidence.isinf().double().mean().item()
    assert metrics.accuracy_at_coverage(confidence, confidence.isinf(), share) == 1
    first = torch.arange(len(x)) == confidence.isinf().nonzero()[0]
    at_first = metrics.accuracy_at_coverage(confidence, first, 1 / len(x))
    assert at_first == pytest.approx(1 / confidence.isinf().sum().item())


# The protocol


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_model_is_undisturbed(name):
    model, x = Counting(), inputs()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    score = make(name)
    if name in ("odin", "rel-u", "rr-bs"):
        score = scores.get(name, temperature=[1.0, 2.0])
        score.fit(model, held_out(), progress=False)
    state = torch.get_rng_state()  # not before: the iterator of a DataLoader draws a seed
    confidence = score.score(model, x)
    assert confidence.shape == (len(x),)
    assert not confidence.requires_grad
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert not x.requires_grad
    assert torch.equal(confidence, score.score(model.eval(), x))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scores_in_any_gradient_mode(name, mode):
    model, score = Counting(), make(name)
    expected = score.score(model, inputs())
    with mode():
        assert torch.equal(score.score(model, inputs()), expected)


@pytest.mark.parametrize("name", BUILT_IN)
def test_forward_rows_are_what_the_model_sees(name):
    model, score = Counting(), make(name)
    for batch in (inputs(40), inputs(10).flip(0)):
        score.score(model, batch)
    assert model.rows == pytest.approx(50 * score.forward_rows)
    gradient = name in ("odin", "doctor-alpha", "doctor-beta", "rr-bs", "rr-fast")
    assert score.backward_rows == gradient


@pytest.mark.parametrize("name", BUILT_IN)
def test_scores_of_the_logits_alone_can_share_a_forward(name):
    radius = name in ("rr-bs", "rr-fast")
    score = make(name, **({"perturbation": 0.0} if name in SCALE else {}))
    assert score.logits_only == (not radius)
    if name in SCALE:
        assert score.forward_rows == 1
        assert score.backward_rows == 0
        assert not make(name).logits_only
    if not radius:
        logits = Counting().eval()(inputs()).detach()
        assert torch.equal(score.score_logits(logits), score.score(Counting(), inputs()))


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_empty_batch_has_no_confidences(name):
    assert make(name).score(Counting(), inputs(0)).shape == (0,)


def test_the_registry():
    assert scores.names() == BUILT_IN
    assert type(scores.get("energy", temperature=2.0)) is scores.Energy
    assert scores.get("energy", temperature=2.0).temperature == 2
    assert type(scores.get("rr-bs")) is rat_ext.radius_scores.RRBS
    with pytest.raises(ValueError, match="no score is named 'mrs'; there are 'msr', 'max-logit'"):
        scores.get("mrs")


def test_a_score_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @scores.register("second-logit")
    class SecondLogit(scores.LogitScore):
        def score_logits(self, logits):
            return -logits.topk(2, dim=1).values[:, 1]

    assert scores.names() == [*BUILT_IN, "second-logit"]
    confidence = scores.get("second-logit").fit(None, []).score(Counting(), inputs())
    logits = Counting().eval()(inputs())
    assert torch.equal(confidence, -logits.sort(1).values[:, -2])
    with pytest.raises(ValueError, match="'second-logit' is already"):
        scores.register("second-logit")(scores.MSR)
    with pytest.raises(TypeError, match="derive it"):
        scores.register("third")(int)


# Errors


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("odin", {"temperature": 0}, ValueError, "temperature 0.0 is out of range"),
        ("odin", {"temperature": [1, math.inf]}, ValueError, "temperature inf"),
        ("odin", {"temperature": []}, ValueError, "temperature is empty"),
        ("doctor-alpha", {"perturbation": [0, -1e-3]}, ValueError, "perturbation -0.001"),
        ("doctor-beta", {"bounds": (1, 0)}, ValueError, "low below high"),
        ("rel-u", {"weight": 2}, ValueError, "weight is 2"),
        ("rr-bs", {"method": "fast"}, TypeError, "RRBS sets method itself"),
    ],
)
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=message):
        scores.get(name, **options)


@pytest.mark.parametrize("name", ["odin", "rr-bs"])
def test_a_score_that_needs_fitting_says_so(name):
    with pytest.raises(RuntimeError, match=r"settings to choose from: call fit\(model, loader\)"):
        scores.get(name).score(Counting(), inputs())


def test_relu_that_is_not_fitted_says_so():
    with pytest.raises(RuntimeError, match="not fitted"):
        scores.get("rel-u", temperature=1.0).score(Counting(), inputs())


def test_relu_needs_right_and_wrong_predictions():
    logits, _ = confused()
    for target, word in ((logits.argmax(1), "right"), (logits.argmin(1), "wrong")):
        with pytest.raises(ValueError, match=f"all 200 held out to learn from are {word}"):
            scores.get("rel-u", temperature=1.0).fit(
                nn.Identity(), logits_loader(logits, target), progress=False
            )


def test_inputs_out_of_bounds_are_refused_only_if_they_would_be_clipped():
    x = inputs() * 4 - 2
    make("odin", perturbation=0.0).score(Counting(), x)
    make("odin", bounds=(-2, 2)).score(Counting(), x)
    with pytest.raises(ValueError, match="normalising before the model"):
        make("odin").score(Counting(), x)


def test_a_model_without_a_graph_is_refused_only_if_a_gradient_is_needed():
    model = Counting().eval()

    def detached(x):
        return model(x).detach()

    make("odin", perturbation=0.0).score(detached, inputs())
    with pytest.raises(RuntimeError, match="do not depend on the input"):
        make("odin").score(detached, inputs())


@pytest.mark.parametrize("name", ["energy", "odin", "rel-u", "rr-bs"])
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "gave no batch"),
        ([inputs()], "must yield"),
        ([(inputs(),)], "must yield"),
        ([(inputs(), torch.ones(40, CLASSES))], r"expected class indices of shape \(40,\)"),
    ],
)
def test_bad_loaders(name, loader, message):
    with pytest.raises(ValueError, match=message):
        scores.get(name, temperature=[1.0, 2.0]).fit(Counting(), loader, progress=False)


def test_bad_models():
    with pytest.raises(TypeError, match=r"lambda x: model\(x\)\[0\]"):
        scores.MSR().score(lambda x: (x, x), inputs())
    with pytest.raises(ValueError, match="at least 2 classes"):
        scores.MSR().score(lambda x: x[:, :1], inputs())


def test_a_fit_shows_its_progress(capsys):
    scores.get("odin", temperature=[1.0, 2.0], perturbation=0.0).fit(Counting(), held_out())
    assert "fit ODIN" in capsys.readouterr().err
