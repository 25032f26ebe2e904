"""Every error of robust_radius and of the reference."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from helpers import RowExact, uniform
from torch import Tensor, nn

from rat_ext import reference, robust_radius

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
        (ValueError, "eps_max is 0; it must be positive", X, {"eps_max": 0}),
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


def test_a_model_that_holds_on_to_a_tensor_of_the_batch_is_told():
    """It runs on some of the rows alone, where its shapes do not fit, or have too many rows."""
    model, x = RowExact(), uniform(8, 12)
    shift = torch.zeros(8, 4, dtype=x.dtype)
    with pytest.raises(ValueError, match=r"\(8, 4\) for 1 inputs.*a tensor of the whole batch"):
        robust_radius(lambda z: model(z) + shift, x, batch_size=1)
