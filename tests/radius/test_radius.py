"""robust_radius: against the reference, and every promise and error of its documentation."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers import FIELDS, RowExact, WithLogits, assert_identical, cnn, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import RadiusResult, reference, robust_radii, robust_radius, temperature_sweep
from rat_ext.search.options import Options

METHODS = ["bs", "fast"]


def assert_brackets_hold(
    model: nn.Module, x: Tensor, result: RadiusResult, rtol: float, temperature: float = 1.0
) -> None:
    """The prediction is kept at `lower` and changed at `upper`, and the bracket is narrow."""
    direction, _, y = reference.fgsm_direction(model, x, temperature)
    options = Options.checked(x)
    found = result.found
    upper = result.upper.where(found, 0)
    ends = (result.lower.clamp_max(1), upper)
    at_lower, at_upper = (model(reference.on_ray(x, direction, end, options)) for end in ends)
    # A batch of another size may round differently, which decides where two logits are equal.
    tied_lower, tied_upper = (
        z.topk(2).values.diff().abs().squeeze(1) < 1e-12 for z in (at_lower, at_upper)
    )
    assert ((at_lower.argmax(1) == y) | tied_lower).all()
    assert ((at_upper.argmax(1) != y) | tied_upper)[found].all()
    assert ((at_upper.argmax(1) == result.flipped_to) | tied_upper)[found].all()
    width = result.upper - result.lower.clamp_min(2.0**-24)
    assert (width <= rtol * result.upper)[found].all()
    assert ((result.radius >= result.lower) & (result.radius <= result.upper)).all()
    assert (result.radius[~found] == math.inf).all()
    assert (result.lower[~found] == 1).all()


# --- Against the reference ------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 20),
    classes=st.integers(2, 9),
    smooth=st.booleans(),
    rtol=st.sampled_from([0.1, 1e-2, 2.0**-12, 1e-6]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_plain_bisection_is_the_reference(n, classes, smooth, rtol, temperature, seed):
    """In float64 the same probes are made, so even the number of rows agrees."""
    model = RowExact(classes=classes, seed=seed) if smooth else mlp(classes=classes, seed=seed)
    x = uniform(n, 12, seed=seed)
    options = {"rtol": rtol, "temperature": temperature, "full": True}
    result = robust_radius(model, x, search="bisect", **options)
    expected = reference.robust_radius(model, x, **options)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-12, atol=0, msg=name
        )
    moved = result.forward_rows > 0  # the reference also probes the rays on which nothing moves
    assert torch.equal(result.forward_rows[moved], expected.forward_rows[moved])


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 20),
    classes=st.integers(2, 9),
    smooth=st.booleans(),
    rtol=st.sampled_from([0.1, 1e-2, 2.0**-12, 1e-6]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    probes=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_brackets_hold_the_flip(n, classes, smooth, rtol, temperature, probes, seed):
    model = RowExact(classes=classes, seed=seed) if smooth else mlp(classes=classes, seed=seed)
    x = uniform(n, 12, seed=seed)
    options = {"rtol": rtol, "temperature": temperature, "full": True}
    result = robust_radius(model, x, probes=probes, **options)
    assert_brackets_hold(model, x, result, rtol, temperature)
    assert (result.forward_rows <= result.worst_case_rows).all()


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 20),
    classes=st.integers(2, 9),
    h=st.sampled_from([1e-5, 1e-3, 0.1]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_rr_fast_is_the_reference(n, classes, h, temperature, seed):
    model, x = mlp(classes=classes, seed=seed), uniform(n, 12, seed=seed)
    options = {"method": "fast", "h": h, "temperature": temperature, "full": True}
    result = robust_radius(model, x, **options)
    expected = reference.robust_radius(model, x, **options)
    # A gap that hardly falls is the difference of nearly equal numbers.
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-7, atol=0, msg=name
        )


@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_with_float64(method):
    model, x = mlp(seed=3), uniform(200, 12, seed=3, dtype=torch.float32)
    options = {"method": method, "rtol": 2.0**-10, "h": 1e-2}
    result = robust_radius(copy.deepcopy(model).float(), x, **options)
    expected = reference.robust_radius(model, x.double(), **options)
    assert result.dtype == torch.float32
    finite = expected.isfinite()
    assert torch.equal(result.isfinite(), finite)
    error = (result[finite] / expected[finite] - 1).abs()
    assert (error > 1e-2).sum() <= 2  # a ray may cross the boundary more than once
    assert error.median() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_inputs(dtype, method):
    model, x = mlp(seed=4), uniform(64, 12, seed=4).to(dtype)
    options = {"method": method, "h": 0.05, "rtol": 0.05}  # bfloat16 has no finer steps
    result = robust_radius(copy.deepcopy(model).to(dtype), x, **options, full=True)
    assert result.radius.dtype == torch.float32
    expected = reference.robust_radius(model, x.double(), **options)
    both = result.found & expected.isfinite()
    assert both.float().mean() > 0.8
    assert (result.radius[both].double() / expected[both]).log().abs().median() < 0.2


def test_regrad_finds_the_same_radii_and_costs_48_forward_rows():
    model, x = mlp(seed=5), uniform(50, 12, seed=5)
    fixed = reference.robust_radius(model, x, rtol=2.0**-8, full=True)
    textbook = reference.robust_radius(model, x, regrad=True, full=True)
    assert (textbook.forward_rows == 48).all()
    assert torch.equal(textbook.found, fixed.found)
    found = fixed.found
    # Large radii take most of the 24 probes to reach, which leaves few to narrow the bracket.
    torch.testing.assert_close(textbook.radius[found], fixed.radius[found], rtol=1 / 16, atol=0)
    with pytest.raises(ValueError, match="regrad=True is a variant of method 'bs'"):
        reference.robust_radius(model, x, regrad=True, method="fast")


def test_temperature_sweep_equals_single_calls():
    model, x = RowExact(), uniform(30, 12)
    temperatures = [0.2, 1.0, 4.0]
    results = temperature_sweep(model, x, temperatures, batch_size=8)
    for temperature, result in zip(temperatures, results, strict=True):
        single = robust_radius(model, x, temperature=temperature, batch_size=8, full=True)
        assert_identical(result, single)
    with pytest.raises(ValueError, match="temperatures is empty"):
        temperature_sweep(model, x, [])


# --- Promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("probes", [1, 3])
def test_order_and_chunks_of_a_batch_change_nothing(method, probes):
    model, x = RowExact(), uniform(40, 12)
    options = {"method": method, "full": True, "probes": probes}
    whole = robust_radius(model, x, **options)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert_identical(robust_radius(model, x[order], **options), whole[order])
    for batch_size in (probes, 7, 39, 1000):
        assert_identical(robust_radius(model, x, batch_size=batch_size, **options), whole)
    parts = [robust_radius(model, part, **options) for part in x.split(11)]
    assert torch.equal(torch.cat([part.radius for part in parts]), whole.radius)


def test_batch_size_bounds_the_rows_of_a_forward():
    seen = []

    class Counting(RowExact):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    for probes in (1, 3):
        result = robust_radius(Counting(), uniform(40, 12), batch_size=16, probes=probes, full=True)
        assert max(seen) <= 16
        assert sum(seen) == 40 + int(result.forward_rows.sum())
        seen.clear()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_leaves_the_others_bit_identical(method, value):
    model, x = RowExact(), uniform(20, 12)
    clean = robust_radius(model, x, method=method, full=True)
    x[7, 3] = value
    for function in (robust_radius, reference.robust_radius):
        with pytest.warns(RuntimeWarning, match="1 of 20 rows have inputs, logits or") as caught:
            result = function(model, x, method=method, full=True)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        for bad in (result.radius, result.lower, result.upper):
            assert bad[7].isnan()
        assert not result.found[7]
        assert result.prediction[7] == result.flipped_to[7] == -1
        if function is robust_radius:
            others = torch.arange(20) != 7
            assert_identical(result[others], clean[others])


def test_logits_that_turn_nan_on_the_way_fail_their_row_only():
    class Fragile(RowExact):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits.where((x[:, :1] != 0.25) | ~self.armed, math.nan)

    model, x = Fragile(), uniform(20, 12)
    x[5, 0] = 0.25
    model.armed = torch.tensor(False)
    clean = robust_radius(model, x, full=True)
    model.armed = torch.tensor(True)
    with pytest.warns(RuntimeWarning, match="1 of 20 rows"):
        result = robust_radius(model, x, full=True)
    others = torch.arange(20) != 5
    assert result.radius[5].isnan()
    assert_identical(result[others], clean[others])


@pytest.mark.parametrize("function", [robust_radius, reference.robust_radius])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_and_the_rng_are_left_as_they_were(function, failing):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()
            self.net[1].eval()  # a frozen batch normalisation in a training model
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1)  # a model may draw random numbers
            if failing and self.calls > 2:
                raise ArithmeticError("out of luck")
            return self.net(x)

    model, x = Model(), uniform(6, 3, 8, 8, dtype=torch.float32)
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    if failing:
        with pytest.raises(ArithmeticError, match="out of luck"):
            function(model, x)
    else:
        first = function(model, x)
        assert torch.equal(first, function(model, x))  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is p.grad is None or torch.equal(p.grad, gradient)
    assert not x.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_works_in_every_grad_mode(method):
    model, x = RowExact(), uniform(10, 12)
    expected = robust_radius(model, x, method=method)
    with torch.no_grad():
        assert torch.equal(robust_radius(model, x, method=method), expected)
    with torch.inference_mode():
        assert torch.equal(robust_radius(model, x, method=method), expected)
        assert torch.equal(robust_radius(model, x.clone(), method=method), expected)
    leaf = x.clone().requires_grad_()
    radius = robust_radius(model, leaf, method=method)
    assert torch.equal(radius, expected)
    assert not radius.requires_grad
    assert leaf.grad is None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(robust_radius(model, x, method=method), expected)


def test_works_under_autocast():
    model, x = mlp(seed=6).float(), uniform(100, 12, seed=6, dtype=torch.float32)
    expected = robust_radius(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        result = robust_radius(model, x, full=True)
    assert result.radius.dtype == torch.float32
    both = result.found & expected.isfinite()
    assert both.float().mean() > 0.8
    assert (result.radius[both] / expected[both]).log().abs().median() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_inputs_stay_so(method):
    strides = set()

    class Model(RowExact):
        def forward(self, x: Tensor) -> Tensor:
            strides.add(x.stride()[1:])
            return super().forward(x.contiguous())

    x = uniform(8, 3, 4, 5)
    model = Model(60)
    expected = robust_radius(model, x, method=method)
    assert strides == {(20, 5, 1)}
    strides.clear()
    channels_last = x.contiguous(memory_format=torch.channels_last)
    result = robust_radius(model, channels_last, method=method)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)  # sums in another order
    assert strides == {(1, 15, 3)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(10, 6, 2), (10, 12), (10, 2, 2, 3), (10, 12, 1, 1)])
def test_any_shape_and_any_strides(method, shape):
    model, x = RowExact(), uniform(*shape)
    expected = robust_radius(model, x.reshape(10, 12), method=method)
    every_other = torch.stack([x, x], -1)[..., 0]
    for view in (x, every_other, x.flip(0).flip(0), torch.cat([x, x])[:10]):
        torch.testing.assert_close(robust_radius(model, view, method=method), expected)
    expanded = x[:1].expand(4, *shape[1:])
    assert torch.equal(robust_radius(model, expanded, method=method), expected[:1].expand(4))


def test_models_with_a_logits_attribute_and_plain_functions():
    model, x = RowExact(), uniform(10, 12)
    expected = robust_radius(model, x)
    assert torch.equal(robust_radius(WithLogits(model), x), expected)
    assert torch.equal(robust_radius(lambda x: model(x), x), expected)
    assert torch.equal(
        reference.robust_radius(WithLogits(model), x, rtol=1e-6).isfinite(), expected.isfinite()
    )


@pytest.mark.parametrize("function", [robust_radius, reference.robust_radius])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_empty_batch_gives_an_empty_result(function, dtype):
    x = torch.empty(0, 3, 8, 8, dtype=dtype)
    radius = function(cnn(), x)
    assert radius.shape == (0,)
    assert radius.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    result = function(cnn(), x, full=True)
    assert len(result) == 0
    assert math.isnan(result.search_report.mean)


def test_bounds_and_eps_max_scale_the_search():
    model, x = RowExact(), uniform(30, 12)

    class Rescaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model((x + 1) / 4)

    result = robust_radius(Rescaled(), x * 4 - 1, bounds=(-1, 3))
    expected = robust_radius(model, x)
    assert torch.equal(result.isfinite(), expected.isfinite())
    torch.testing.assert_close(result / 4, expected, rtol=1e-2, atol=0)
    eps_max = expected[expected.isfinite()].median().item()
    near = robust_radius(model, x, eps_max=eps_max, full=True)
    assert (near.upper[near.found] <= eps_max).all()
    assert (near.lower[~near.found] == eps_max).all()
    assert (expected[near.found] <= eps_max * 1.01).all()
    assert 0 < near.found.sum() < expected.isfinite().sum()


def test_a_constant_model_has_no_boundary():
    def constant(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * torch.tensor([0.0, 0.0]) + torch.tensor([1.0, 0.0])

    for method in METHODS:
        result = robust_radius(constant, torch.rand(3, 4), method=method, full=True)
        assert (result.radius == math.inf).all()
        assert not result.found.any()
        assert (result.forward_rows == 0).all()


def test_search_report_counts_rows():
    result = robust_radius(RowExact(), uniform(50, 12), full=True)
    report = result.search_report
    assert torch.equal(report.rows, result.forward_rows)
    assert report.histogram.sum() == 50
    assert (report.histogram * torch.arange(len(report.histogram))).sum() == report.rows.sum()
    assert report.mean == pytest.approx(report.rows.double().mean().item())
    assert report.p95 >= report.rows.median()
    assert report.rows.max() <= report.worst_case
    assert 0 <= report.fallback_share <= 1


# --- Loaders --------------------------------------------------------------------------------------


def test_robust_radii_runs_over_a_loader(capsys):
    model, x = RowExact(), uniform(25, 12)
    t = torch.arange(25) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, t), batch_size=8)
    radii = robust_radii(model, loader)
    assert "robust radius" in capsys.readouterr().err
    assert torch.equal(radii.target, t)
    assert torch.equal(radii.radius, robust_radius(model, x))
    assert torch.equal(radii.prediction, model(x).argmax(1))
    alone = robust_radii(model, x.split(10), progress=False, method="fast")
    assert capsys.readouterr().err == ""
    assert alone.target is None
    assert torch.equal(alone.radius, robust_radius(model, x, method="fast"))
    with pytest.raises(ValueError, match="the loader gave no batch"):
        robust_radii(model, [], progress=False)


# --- Errors ---------------------------------------------------------------------------------------

X = uniform(4, 12)


@pytest.mark.parametrize("function", [robust_radius, reference.robust_radius])
@pytest.mark.parametrize(
    ("error", "message", "x", "options"),
    [
        (ValueError, "normalisation inside the model", X * 4 - 2, {}),
        (ValueError, r"bounds \(0, 1\), in 1 of 4 rows", X + X.new_tensor([[0, 0, 0, 2]]).T, {}),
        (ValueError, r"values from 0 to 1, outside bounds \(0, 0.5\)", X, {"bounds": (0, 0.5)}),
        (TypeError, r"torch.uint8; expected a floating-point .* x.float\(\) / 255", X.byte(), {}),
        (TypeError, "x is a list; expected a torch.Tensor", [[0.5]], {}),
        (ValueError, r"shape \(12,\); expected a batch .* x\[None\]", X[0], {}),
        (ValueError, "method is 'newton'; expected 'bs' or 'fast'", X, {"method": "newton"}),
        (ValueError, "attack is 'magic'; expected 'fgsm'", X, {"attack": "magic"}),
        (ValueError, "rtol is 0; .* at least", X, {"rtol": 0}),
        (ValueError, "rtol is 1e-06; for torch.float32", X.float(), {"rtol": 1e-6}),
        (ValueError, r"bounds is \(1, 0\); low must be below high", X, {"bounds": (1, 0)}),
        (ValueError, r"bounds is \(0,\); expected \(low, high\)", X, {"bounds": (0,)}),
        (ValueError, "temperature is 0; it must be positive", X, {"temperature": 0}),
        (ValueError, "eps_max is -1; it must be positive", X, {"eps_max": -1}),
        (ValueError, "h is nan; it must be positive", X, {"h": math.nan}),
        (ValueError, "batch_size is 0; it must be at least 1", X, {"batch_size": 0}),
    ],
)
def test_bad_arguments(function, error, message, x, options):
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(x)
        return x

    with pytest.raises(error, match=message):
        function(model, x, **options)
    assert not calls  # raised before work starts


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("search is 'dance'; expected 'interpolate' or 'bisect'", {"search": "dance"}),
        ("probes is 0; it must be from 1 to 32", {"probes": 0}),
        ("probes is 33; it must be from 1 to 32", {"probes": 33}),
        ("batch_size is 2, .* use probes=2 or fewer", {"batch_size": 2, "probes": 3}),
    ],
)
def test_bad_search_arguments(message, options):
    with pytest.raises(ValueError, match=message):
        robust_radius(RowExact(), X, **options)


@pytest.mark.parametrize("function", [robust_radius, reference.robust_radius])
@pytest.mark.parametrize(
    ("error", "message", "model"),
    [
        (TypeError, r"returned tuple; .* lambda x: model\(x\)\[0\]", lambda x: (x, x)),
        (ValueError, r"shape \(4, 1\) .* at least 2 classes", lambda x: x[:, :1]),
        (ValueError, r"shape \(4,\) for 4 inputs; expected \(4, classes\)", lambda x: x[:, 0]),
        (ValueError, r"shape \(3, 12\) for 4 inputs", lambda x: x[:3]),
        (TypeError, "returned torch.int64; expected floating-point", lambda x: x.long()),
        (RuntimeError, "do not depend on the input through autograd", lambda x: x.detach()),
    ],
)
def test_bad_model_outputs(function, error, message, model):
    with pytest.raises(error, match=message):
        function(model, X)


@pytest.mark.parametrize("function", [robust_radius, reference.robust_radius])
def test_model_and_input_on_different_devices(function):
    model = nn.Linear(12, 3, device="meta")
    with pytest.raises(ValueError, match=r"x is on cpu but the model is on meta; .*x.to\('meta'\)"):
        function(model, X)


def test_no_warning_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        robust_radius(RowExact(), X)
