"""RadiusEstimator: equal to robust_radius in each of its modes, with the same promises.

CUDA graphs are stood in for by `RecordedGraphs`. What only a GPU can show is in tests/gpu.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from functools import partial

import pytest
import torch
from graph_helpers import MODES, estimator_in
from helpers import RowExact, WithLogits, assert_identical, cnn, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import RadiusEstimator, RadiusResult, robust_radius


@settings(deadline=None, max_examples=30)
@given(
    mode=st.sampled_from(MODES),
    size=st.integers(1, 9),
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    options=st.sampled_from(
        [{}, {"probes": 3}, {"search": "bisect"}, {"method": "fast"}, {"temperature": 0.2}]
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_equals_robust_radius(mode, size, counts, options, dtype, seed):
    model = RowExact(seed=seed)
    estimator = estimator_in(mode, model, uniform(size, 12, dtype=dtype), **options)
    for i, count in enumerate(counts):
        x = uniform(count, 12, dtype=dtype, seed=seed + i)
        expected = robust_radius(model, x, full=True, **options)
        assert_identical(estimator(x), expected, rows_too=count > 0)


class Scaled(RowExact):
    """Takes a scale for each sample, and a shift for all of them."""

    def forward(self, x: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
        return super().forward(x * scale + shift)


def scale_of(rows: int, seed: int) -> Tensor:
    return 0.2 + 2 * uniform(rows, 1, seed=seed + 1000)


@settings(deadline=None, max_examples=30)
@given(
    mode=st.sampled_from(MODES),
    size=st.integers(1, 9),
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    options=st.sampled_from([{}, {"probes": 3}, {"method": "fast"}]),
    seed=st.integers(0, 100),
)
def test_every_call_has_its_own_arguments(mode, size, counts, options, seed):
    model, example = Scaled(seed=seed), scale_of(size, seed)
    kept = {"scale": example, "shift": 0.1}
    estimator = estimator_in(mode, model, uniform(size, 12), model_kwargs=kept, **options)
    for i, count in enumerate(counts):
        x, scale = uniform(count, 12, seed=seed + i), scale_of(count, seed + i)
        arguments = {"scale": scale, "shift": 0.1}
        expected = robust_radius(model, x, full=True, model_kwargs=arguments, **options)
        result = estimator(x, model_kwargs={"scale": scale})
        assert_identical(result, expected, rows_too=count > 0)
    assert torch.equal(example, scale_of(size, seed))  # the estimator has buffers of its own


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("has nothing; the arguments of each sample .* are scale", None),
        ("has scale, shift; .* are scale", {"scale": scale_of(3, 0), "shift": 0.1}),
        ("scale of model_kwargs is of shape .5, 1.*takes .3, 1", {"scale": scale_of(5, 0)}),
        ("scale of model_kwargs is .*float32", {"scale": scale_of(3, 0).float()}),
        ("scale of model_kwargs is .* on meta", {"scale": scale_of(3, 0).to("meta")}),
        ("scale of model_kwargs is float", {"scale": 1.0}),
    ],
)
def test_arguments_unlike_those_of_the_example(message, given):
    kept = {"scale": scale_of(4, 0), "shift": 0.1}
    estimator = RadiusEstimator(Scaled(), uniform(4, 12), model_kwargs=kept)
    with pytest.raises(ValueError, match=message):
        estimator(uniform(3, 12), model_kwargs=given)
    with pytest.raises(ValueError, match=r"has scale; .* are none"):
        RadiusEstimator(RowExact(), uniform(4, 12))(
            uniform(3, 12), model_kwargs={"scale": scale_of(3, 0)}
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_inputs(mode, dtype):
    model, x = RowExact(), uniform(11, 12).to(dtype)
    estimator = estimator_in(mode, model, x[:4], rtol=0.15)
    assert_identical(estimator(x), robust_radius(model, x, rtol=0.15, full=True))


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_finite_fail_alone_and_leave_no_trace(mode):
    model, x = RowExact(), uniform(7, 12)
    estimator = estimator_in(mode, model, x)
    expected = robust_radius(model, x, full=True)
    x[3, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 7 rows") as caught:
        result = estimator(x)
    assert caught[0].filename == __file__
    assert result.radius[3].isnan()
    rest = [0, 1, 2, 4, 5, 6]
    assert_identical(result[rest], expected[rest])
    assert_identical(estimator(x[:3]), expected[:3])  # padded with what is left of row 3


@pytest.mark.parametrize("mode", MODES)
def test_unchecked_bad_rows_get_nan_in_silence(mode):
    model, x = RowExact(), uniform(6, 12)
    expected = robust_radius(model, x, full=True)
    estimator = estimator_in(mode, model, x, check_input=False)
    x[1, 0], x[4, 5] = math.inf, 1.5
    result = estimator(x)
    assert result.radius.isnan().tolist() == [False, True, False, False, True, False]
    assert_identical(result[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_any_strides_and_channels_last():
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return exact(x)

    exact, x = RowExact(), uniform(5, 3, 2, 2).to(memory_format=torch.channels_last)
    expected = robust_radius(exact, x, full=True)
    estimator = RadiusEstimator(model, x)
    assert_identical(estimator(x), expected)
    assert_identical(estimator(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert_identical(estimator(x.contiguous()), expected)
    assert all(seen)


@pytest.mark.parametrize("mode", MODES)
def test_sees_parameters_that_changed_in_place(mode):
    model, x = RowExact(), uniform(6, 12)
    estimator = estimator_in(mode, model, x)
    model.load_state_dict(RowExact(seed=1).state_dict())
    assert_identical(estimator(x), robust_radius(RowExact(seed=1), x, full=True))


def test_compiled_models():
    model, x = mlp(), uniform(6, 12)
    with warnings.catch_warnings():  # of torch's own
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager")
        result = RadiusEstimator(compiled, x)(x)
    torch.testing.assert_close(result.radius, robust_radius(model, x))


def test_objects_with_logits():
    model, x = RowExact(), uniform(6, 12)
    result = RadiusEstimator(WithLogits(model), x)(x)
    assert_identical(result, robust_radius(model, x, full=True))


def test_autocast_is_that_of_the_construction():
    model, x = mlp().float(), uniform(6, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        estimator = RadiusEstimator(model, x)
        expected = robust_radius(model, x, full=True)
    plain = RadiusEstimator(model, x)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=0)
    close(estimator(x).radius, expected.radius)
    with torch.autocast("cpu", torch.bfloat16):
        inside = plain(x)
    close(inside.radius, robust_radius(model, x))
    assert not torch.allclose(inside.radius, expected.radius, rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_model_and_the_rng_are_left_as_they_were(mode):
    model, x = cnn(), uniform(6, 3, 8, 8, dtype=torch.float32)
    model[1].eval()
    model(x).sum().backward()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    estimator = estimator_in(mode, model, x[:4])
    if mode == "eager":  # else a call runs no Python of the model, but for RecordedGraphs
        torch.testing.assert_close(estimator(x).radius, robust_radius(model, x), rtol=0.01, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_every_grad_mode(context):
    model, x = RowExact(), uniform(6, 12)
    expected = robust_radius(model, x, full=True)
    with context():
        estimator = RadiusEstimator(model, x.clone())
        assert_identical(estimator(x.clone()), expected)
    assert_identical(estimator(x.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert_identical(estimator(x.clone()), expected)


def test_results_outlive_the_next_call():
    model, x = RowExact(), uniform(12, 12)
    estimator = RadiusEstimator(model, x[:6])
    first = estimator(x[:6])
    estimator(x[6:])
    assert_identical(first, robust_radius(model, x[:6], full=True))


def test_a_call_that_fails_leaves_the_estimator_usable():
    class Failing(nn.Module):
        failing = False

        def forward(self, x: Tensor) -> Tensor:
            if self.failing and not x.requires_grad:
                raise KeyError("down")
            return exact(x)

    exact, x = RowExact(), uniform(6, 12)
    model = Failing().train()
    estimator = RadiusEstimator(model, x)
    model.failing = True
    with pytest.raises(KeyError, match="down"):
        estimator(x)
    assert model.training
    model.failing = False
    assert_identical(estimator(x), robust_radius(exact, x, full=True))


@pytest.mark.parametrize("mode", MODES)
def test_threads_take_turns(mode):
    model, batches = RowExact().eval(), [uniform(7, 12, seed=seed) for seed in range(6)]
    estimator = estimator_in(mode, model, batches[0][:5])
    results: dict[int, RadiusResult] = {}

    def work(i: int) -> None:
        results[i] = estimator(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(batches):
        assert_identical(results[i], robust_radius(model, x, full=True))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "that of example_x", {"batch_size": 3}),
        (ValueError, "method is 'fats'", {"method": "fats"}),
        (ValueError, "outside bounds", {"bounds": (0.0, 0.1)}),
        (TypeError, "unexpected keyword", {"epsilon": 3}),
    ],
)
def test_bad_options(error, message, options):
    with pytest.raises(error, match=message):
        RadiusEstimator(RowExact(), uniform(4, 12), **options)


@pytest.mark.parametrize(
    ("error", "message", "x"),
    [
        (TypeError, "is a list", [0.5]),
        (ValueError, "rows of shape", uniform(4, 11)),
        (ValueError, "Convert x", uniform(4, 12, dtype=torch.float32)),
        (ValueError, "outside bounds", uniform(4, 12) + 1),
        (ValueError, "on meta", uniform(4, 12).to("meta")),
    ],
)
def test_bad_inputs(error, message, x):
    estimator = RadiusEstimator(RowExact(), uniform(4, 12))
    with pytest.raises(error, match=message):
        estimator(x)


def test_bad_examples():
    with pytest.raises(ValueError, match="no rows"):
        RadiusEstimator(RowExact(), uniform(0, 12))
    with pytest.raises(ValueError, match="outside bounds"):
        RadiusEstimator(RowExact(), uniform(4, 12) * 2)
    with pytest.raises(RuntimeError, match="do not depend on the input"):
        RadiusEstimator(lambda x: x.detach()[:, :4], uniform(4, 12))
