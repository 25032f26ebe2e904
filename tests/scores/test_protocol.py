"""What all scores do and say of themselves, the registry, and errors."""

import math

import pytest
import torch
from score_helpers import BUILT_IN, CLASSES, PERTURBED, Counting, held_out, inputs, make

import rat_ext.radius_scores
from rat_ext import scores
from rat_ext.scores import registry


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
    gradient = name in (*PERTURBED, "rr-bs", "rr-fast")
    assert score.backward_rows == gradient


@pytest.mark.parametrize("name", BUILT_IN)
def test_scores_of_the_logits_alone_can_share_a_forward(name):
    radius = name in ("rr-bs", "rr-fast")
    score = make(name, **({"perturbation": 0.0} if name in PERTURBED else {}))
    assert score.logits_only == (not radius)
    if name in PERTURBED:
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


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("odin", {"temperature": 0}, ValueError, "temperature 0.0 is out of range"),
        ("odin", {"temperature": [1, math.inf]}, ValueError, "temperature inf"),
        ("odin", {"temperature": []}, ValueError, "temperature is empty"),
        ("doctor-alpha", {"perturbation": [0, -1e-3]}, ValueError, "perturbation -0.001"),
        ("doctor-beta", {"bounds": (1, 0)}, ValueError, "low must be below high"),
        ("rel-u", {"weight": 2}, ValueError, "weight is 2"),
        ("rr-bs", {"method": "fast"}, TypeError, "RRBS sets method itself"),
    ],
)
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=message):
        scores.get(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("odin", {}, r"settings to choose from: call fit\(model, loader\)"),
        ("rr-bs", {}, r"settings to choose from: call fit\(model, loader\)"),
        ("rel-u", {"temperature": 1.0}, r"not fitted: call fit\(model, loader\)"),
    ],
)
def test_a_score_that_needs_fitting_says_so(name, options, message):
    score = scores.get(name, **options)
    assert score.needs_fit
    with pytest.raises(RuntimeError, match=message):
        score.score(Counting(), inputs())


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
