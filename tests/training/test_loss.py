"""RATLoss: against the reference, and as a part of a training loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import RowExact, WithLogits, cnn, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import RATLoss, reference


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 12),
    classes=st.integers(2, 6),
    eps=st.sampled_from([0.0, 1e-3, 0.05]),
    lam=st.sampled_from([0.0, 1.0, 2.5]),
    steps=st.integers(1, 3),
    smooth=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_those_of_the_reference(n, classes, eps, lam, steps, smooth, seed):
    model = RowExact(classes=classes, seed=seed) if smooth else mlp(classes=classes, seed=seed)
    x = uniform(n, 12, seed=seed)
    t = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    out = RATLoss(eps, lam, steps=steps)(model, x, t)
    expected = reference.rat_loss(model, x, t, eps=eps, lam=lam, steps=steps)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.loss.detach(), out.clean + lam * out.perturbed)
    torch.testing.assert_close(out.clean, F.cross_entropy(model(x), t).detach())
    torch.testing.assert_close(out.logits, model(x).detach())
    for a, b in zip(gradients(model, out.loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_right_samples_are_attacked_and_wrong_ones_helped():
    model, x = mlp(seed=1), uniform(64, 12, seed=1)
    prediction = model(x).argmax(1)
    criterion = RATLoss(eps=1e-3, lam=1.0)
    for t, worse in ((prediction, True), ((prediction + 1) % 4, False)):
        out = criterion(model, x, t)
        assert (out.perturbed > out.clean) == worse


def test_a_step_runs_two_forwards_and_two_backwards():
    calls = {"forward": 0, "backward": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            calls["forward"] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            calls["backward"] += 1
            return gradient

    class Counting(RowExact):
        def forward(self, x: Tensor) -> Tensor:
            return Count.apply(super().forward(x))

    model = Counting()
    RATLoss()(model, uniform(4, 12), torch.zeros(4, dtype=torch.long)).loss.backward()
    assert calls == {"forward": 2, "backward": 2}
    RATLoss(steps=3)(model, uniform(4, 12), torch.zeros(4, dtype=torch.long)).loss.backward()
    assert calls == {"forward": 2 + 4, "backward": 2 + 4}


def test_scaled_and_accumulated_losses():
    model, x = mlp(), uniform(8, 12)
    t = torch.arange(8) % 4
    criterion = RATLoss(eps=0.01)
    single = gradients(model, criterion(model, x, t).loss)
    scaled = gradients(model, criterion(model, x, t).loss * 4)
    for a, b in zip(single, scaled, strict=True):
        torch.testing.assert_close(4 * a, b)
    both = gradients(model, criterion(model, x, t).loss + criterion(model, x, t).loss)
    for a, b in zip(single, both, strict=True):
        torch.testing.assert_close(2 * a, b)
    loss = criterion(model, x, t).loss
    loss.backward(retain_graph=True)
    again = gradients(model, loss)  # a graph that was kept can be used twice
    for a, b in zip(single, again, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_and_unused_parameters():
    model = mlp()
    model.unused = nn.Parameter(torch.ones(3))
    frozen = model[1].weight.requires_grad_(False)
    out = RATLoss()(model, uniform(6, 12), torch.zeros(6, dtype=torch.long))
    out.loss.backward()
    assert frozen.grad is None
    assert model.unused.grad is None or not model.unused.grad.any()
    assert model[3].weight.grad.any()


def test_without_gradients_it_still_measures():
    model, x, t = mlp(), uniform(6, 12), torch.zeros(6, dtype=torch.long)
    expected = RATLoss()(model, x, t).loss.detach()
    with torch.no_grad():
        loss = RATLoss()(model, x, t).loss
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(RATLoss()(model, x, t).loss, expected)


def test_class_probabilities_as_targets():
    """One-hot probabilities are the classes themselves; a mixture is the mixture of its losses."""
    model, x = mlp(), uniform(10, 12)
    t = torch.arange(10) % 4
    one_hot = F.one_hot(t, 4).double()
    a = RATLoss(eps=0.01)(model, x, t)
    b = RATLoss(eps=0.01)(model, x, one_hot)
    torch.testing.assert_close(a.loss, b.loss)
    for p, q in zip(gradients(model, a.loss), gradients(model, b.loss), strict=True):
        torch.testing.assert_close(p, q)
    mixed = RATLoss(eps=0.0)(model, x, 0.7 * one_hot + 0.3 * one_hot.roll(1, 0))
    expected = 0.7 * F.cross_entropy(model(x), t) + 0.3 * F.cross_entropy(model(x), t.roll(1, 0))
    torch.testing.assert_close(mixed.clean, expected.detach())


def test_confident_samples_are_moved_in_float32():
    """There softmax_t - 1 rounds to 0, and the other classes' terms alone point elsewhere."""
    torch.manual_seed(0)
    model, x = nn.Linear(50, 5).double(), uniform(40, 50)
    with torch.no_grad():
        model.weight *= 150
    t = model(x).argmax(1)
    confident = (1 - model(x).softmax(1).amax(1)) < 1e-8
    assert confident.sum() > 5
    moved = {}
    for dtype in (torch.float32, torch.float64):
        seen = []
        net = copy.deepcopy(model).to(dtype)
        net.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        RATLoss(eps=0.01)(net, x.to(dtype), t)
        moved[dtype] = (seen[1].double() - seen[0].double())[confident].sign()
    agreement = (moved[torch.float32] == moved[torch.float64]).double().mean()
    assert agreement > 0.99
    leaf = x.float().requires_grad_()
    F.cross_entropy(copy.deepcopy(model).float()(leaf), t).backward()
    moving = moved[torch.float64] != 0
    textbook = leaf.grad[confident].sign()
    assert (textbook == moved[torch.float64])[moving].double().mean() < 0.9


def test_confident_samples_are_moved_by_every_step_in_half_precision():
    """There the other classes' probabilities are 0, and what they add up to is not."""
    seen = []

    class Confident(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return torch.cat([18 + x.sum(1, keepdim=True), x.new_zeros(len(x), 1000)], 1)

    x, t = torch.full((2, 4), 0.5, dtype=torch.float16), torch.zeros(2, dtype=torch.int64)
    RATLoss(eps=0.25, steps=3, step_size=1 / 16)(Confident(), x, t)
    sizes = [(point - x).abs().unique().tolist() for point in seen]
    assert sizes == [[0], [1 / 16], [2 / 16], [3 / 16]]


def test_training_mode_and_batch_normalisation():
    model, x = cnn(), uniform(8, 3, 8, 8, dtype=torch.float32)
    out = RATLoss()(model, x, torch.zeros(8, dtype=torch.long))
    assert model.training
    assert model[1].num_batches_tracked == 2
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_and_logits_attribute():
    model, x = mlp().float(), uniform(32, 12, dtype=torch.float32)
    t = model(x).argmax(1)
    expected = gradients(model, RATLoss(eps=0.01)(model, x, t).loss)
    wrapped = gradients(model, RATLoss(eps=0.01)(WithLogits(model), x, t).loss)
    for a, b in zip(expected, wrapped, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        out = RATLoss(eps=0.01)(model, x, t)
    assert out.loss.dtype == torch.float32
    for a, b in zip(expected, gradients(model, out.loss), strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98


def test_it_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    x = uniform(200, 12, dtype=torch.float32)
    t = (x[:, :3]).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    criterion = RATLoss(eps=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        out = criterion(model, x, t)
        out.loss.backward()
        optimizer.step()
    assert (out.logits.argmax(1) == t).float().mean() > 0.95


T = torch.zeros(4, dtype=torch.long)
X = uniform(4, 12)


@pytest.mark.parametrize(
    ("error", "message", "x", "t", "options"),
    [
        (ValueError, "eps is -1; it must be finite", X, T, {"eps": -1}),
        (ValueError, "lam is nan; it must be finite", X, T, {"lam": math.nan}),
        (ValueError, "steps is 0; it must be at least 1", X, T, {"steps": 0}),
        (ValueError, "step_size is -1", X, T, {"step_size": -1}),
        (ValueError, r"bounds is \(1, 1\)", X, T, {"bounds": (1, 1)}),
        (
            ValueError,
            "in 1 of 4 rows.* normalisation inside the model",
            X + X.new_tensor([[0, 0, 0, 2]]).T,
            T,
            {},
        ),
        (TypeError, r"x is torch.uint8; .* x.float\(\) / 255", X.byte(), T, {}),
        (ValueError, r"t has shape \(3,\)", X, T[:3], {}),
        (ValueError, r"t has shape \(4,\) and torch.float32", X, T.float(), {}),
        (
            ValueError,
            "t has classes from 0 to 4, but the model has 4",
            X,
            T + X.new_tensor([0, 0, 0, 4]).long(),
            {},
        ),
    ],
)
def test_bad_arguments(error, message, x, t, options):
    with pytest.raises(error, match=message):
        RATLoss(**options)(mlp(), x, t)


def test_a_function_is_no_model():
    with pytest.raises(TypeError, match=r"model is a function; RATLoss needs an nn.Module"):
        RATLoss()(lambda x: x, X, T)


def test_inputs_may_leave_the_bounds_by_rounding_or_have_none():
    model, t = mlp().float(), torch.tensor([0, 1, 2, 3])
    x = (uniform(4, 12, dtype=torch.float32) * 6 - 3).clamp(-2.1179, 2.64)
    assert x.max().double() > 2.64
    losses = [
        RATLoss(eps=1e-3, bounds=bounds)(model, x, t).loss
        for bounds in ((-2.1179, 2.64), (-9, 9), None)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    assert torch.equal(losses[1], losses[2])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("where", ["input", "logits", "no_grad"])
def test_a_model_that_cuts_the_graph(where: str, steps: int) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if where == "no_grad":
                with torch.no_grad():
                    return self.linear(x)
            return self.linear(x.detach()) if where == "input" else self.linear(x).detach()

    x, t = torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"do not depend on the input .*does it detach"):
        RATLoss(steps=steps)(Cut(), x, t)


def test_parameters_that_the_logits_do_not_depend_on() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Fixed()
    out = RATLoss()(model, torch.rand(5, 4), torch.zeros(5, dtype=torch.int64))
    out.loss.backward()
    assert model.unused.grad is None
