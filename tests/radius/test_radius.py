"""robust_radius: the promises of its documentation."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import RowExact, WithLogits, assert_identical, cnn, mlp, uniform
from torch import Tensor, nn

from rat_ext import reference, robust_radius, temperature_sweep
from rat_ext.search.options import OPTIONS

METHODS = ["bs", "fast"]


def test_temperature_sweep_equals_single_calls():
    model, x = RowExact(), uniform(30, 12)
    temperatures = [0.2, 1.0, 4.0]
    results = temperature_sweep(model, x, temperatures, batch_size=8)
    for temperature, result in zip(temperatures, results, strict=True):
        single = robust_radius(model, x, temperature=temperature, batch_size=8, full=True)
        assert_identical(result, single)
    with pytest.raises(ValueError, match="temperatures is empty"):
        temperature_sweep(model, x, [])


def test_temperature_sweep_warns_of_every_temperature():
    """Only on the ray of the second one a change is found, in a bracket as wide as bfloat16's."""

    def model(x):
        first = x[:, :1].float()
        return torch.cat([0 * first, first - 1, -5 * first - 1000], 1)

    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="1 of 1 rows have a bracket that is wider"):
        coarse = temperature_sweep(model, x, [1e4, 1.0], bounds=None, eps_max=10.0)
    assert [bool(result.resolved) for result in coarse] == [True, False]


def test_a_sweep_of_one_temperature_warns_as_a_single_call_does():
    model, x = RowExact(), uniform(20, 12)
    x[7, 3] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 20 rows") as expected:
        single = robust_radius(model, x, temperature=3.0, full=True)
    with pytest.warns(RuntimeWarning, match="1 of 20 rows") as caught:
        (result,) = temperature_sweep(model, x, [3.0])
    assert [str(each.message) for each in caught] == [str(each.message) for each in expected]
    assert caught[0].filename == __file__
    assert_identical(result, single)


def test_help_shows_every_option():
    parameters = inspect.signature(robust_radius).parameters
    documentation = " ".join(robust_radius.__doc__.split())
    for name, option in OPTIONS.items():
        assert parameters[name].default == option.default
        assert f"{name}: {option.help}" in documentation


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "measure",
    [
        robust_radius,
        lambda model, x: temperature_sweep(model, x, [1.0])[0].radius,
        reference.robust_radius,
        partial(reference.robust_radius, attack="pgd_l2"),
        partial(reference.robust_radius, method="fast"),
        partial(reference.robust_radius, regrad=True),
    ],
)
def test_a_row_that_is_not_finite_has_no_radius_where_its_logits_are(measure, value):
    model, x = RowExact(), uniform(4, 12)
    x[2, 3] = value
    with pytest.warns(RuntimeWarning, match="1 of 4 rows"):
        radius = measure(lambda x: model(x.nan_to_num(0.5, 1.0)), x)
    assert radius.isnan().tolist() == [False, False, True, False]


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
    assert result.search_report.fallback_share == 0


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


@pytest.mark.parametrize("options", [{"method": "bs"}, {"method": "fast"}, {"attack": "fgsm_l2"}])
def test_a_constant_model_has_no_boundary(options):
    def constant(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * torch.tensor([0.0, 0.0]) + torch.tensor([1.0, 0.0])

    x = torch.rand(3, 4)
    result = robust_radius(constant, x, full=True, **options)
    assert (result.radius == math.inf).all()
    assert not result.found.any()
    assert (result.forward_rows == 0).all()
    assert_identical(reference.robust_radius(constant, x, full=True, **options), result, False)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", ["fgsm", "pgd"]])
@pytest.mark.parametrize("rows", [0, 3])
def test_the_fields_have_the_dtypes_of_the_documentation(attack, rows):
    result = robust_radius(mlp(), uniform(rows, 12), attack=attack, full=True)
    kinds = {torch.float64: ["radius", "lower", "upper"], torch.bool: ["found", "resolved"]}
    counts = ["forward_rows", "fallbacks", "backward_rows", "won"]
    kinds[torch.int64] = ["prediction", "flipped_to", *counts]
    for dtype, names in kinds.items():
        for name in names:
            assert getattr(result, name).dtype == dtype, name
            assert getattr(result, name).shape == (rows,), name


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
    half = replace(
        result, fallbacks=result.forward_rows.clone(), forward_rows=2 * result.forward_rows
    )
    assert half.search_report.fallback_share == 0.5
