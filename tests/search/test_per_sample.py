"""Arguments of a model for each sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rat_ext
from rat_ext import Detector, RadiusEstimator, RATLoss, reference, scores
from rat_ext._common.per_sample import PerSample

FEATURES, CLASSES = 6, 4


class Masked(nn.Module):
    """A classifier of the elements that a mask leaves, with a scale for each sample."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.out = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, *, mask: Tensor, sharpness: float | Tensor = 1.0) -> Tensor:
        assert len(mask) == len(x)
        return sharpness * self.out(torch.tanh(self.hidden(x * mask)))


def batch(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, FEATURES, dtype=torch.float64, generator=generator)
    mask = (torch.rand(n, FEATURES, generator=generator) < 0.7).double()
    mask[:, 0] = 1
    return x, mask


WIDE = {"bounds": (-5.0, 5.0)}


def one_by_one(x: Tensor, mask: Tensor, **options) -> Tensor:
    """Each sample alone, where a closure is right."""
    model, radii = Masked(), []
    for row, m in zip(x, mask, strict=True):
        alone = rat_ext.robust_radius(
            lambda z, m=m: model(z, mask=m.expand_as(z)), row[None], **{**WIDE, **options}
        )
        radii.append(alone)
    return torch.cat(radii)


OPTIONS = [
    {},
    {"method": "fast"},
    {"attack": "pgd", "steps": 3},
    {"attack": "fgsm_l2"},
    {"attack": "pgd_l2", "steps": 3},
    {"target": "runner-up"},
    {"probes": 3},
    {"search": "bisect"},
    {"bounds": None},
    {"attack": "best", "steps": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 50), size=st.sampled_from([None, 1, 5]))
def test_every_sample_has_its_own_arguments(options, seed, size):
    if options.get("attack") == "best":
        options = {**options, "attack": ["fgsm", "pgd"]}
    options = {**WIDE, **options}
    if size is not None:
        size = max(size, options.get("probes", 1))
    x, mask = batch(seed=seed)
    kwargs = {"mask": mask, "sharpness": 3.0}
    model = Masked()
    result = rat_ext.robust_radius(
        model, x, model_kwargs=kwargs, batch_size=size, full=True, rtol=1e-4, **options
    )
    model_of_3 = {"temperature": 1 / 3} if options.get("target") != "runner-up" else {}
    expected = one_by_one(x, mask, rtol=1e-4, **options, **model_of_3)
    torch.testing.assert_close(result.radius, expected, rtol=3e-4, atol=1e-9)
    assert result.found.any()
    order = torch.randperm(len(x))
    permuted = rat_ext.robust_radius(
        model, x[order], model_kwargs={**kwargs, "mask": mask[order]}, rtol=1e-4, **options
    )
    torch.testing.assert_close(permuted, result.radius[order], rtol=3e-4, atol=1e-9)


def test_the_arguments_matter():
    x, mask = batch()
    model = Masked()
    right = rat_ext.robust_radius(model, x, model_kwargs={"mask": mask}, **WIDE)
    others = rat_ext.robust_radius(model, x, model_kwargs={"mask": mask.flip(0)}, **WIDE)
    assert (right != others).any()
    # A closure that slices pairs the rows that are left with the arguments of the first ones.
    wrong = rat_ext.robust_radius(lambda z: model(z, mask=mask[: len(z)]), x, **WIDE)
    off = (wrong - right).abs() > 0.01 * right
    assert (off & right.isfinite() & wrong.isfinite()).any()


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "fgsm_l2", "pgd_l2"])
def test_the_reference_takes_them(attack):
    x, mask = batch(8)
    model, kwargs = Masked(), {"mask": mask}
    options = {**WIDE, "attack": attack, "rtol": 1e-6, "full": "points"}
    if "pgd" in attack:
        options["steps"] = 3
    ours = rat_ext.robust_radius(model, x, model_kwargs=kwargs, **options)
    theirs = reference.robust_radius(model, x, model_kwargs=kwargs, **options)
    alone = [
        reference.robust_radius(lambda z, m=m: model(z, mask=m.expand_as(z)), row[None], **options)
        for row, m in zip(x, mask, strict=True)
    ]
    torch.testing.assert_close(theirs.radius, torch.cat([each.radius for each in alone]))
    found = ours.found & theirs.found
    assert torch.equal(ours.found, theirs.found)
    assert found.any()
    if "pgd" not in attack:  # whose search takes other balls here
        torch.testing.assert_close(ours.radius[found], theirs.radius[found], rtol=2e-2, atol=0)
    assert ours.is_adv[ours.found].all()
    for result in (ours, theirs):
        flipped = model(result.x_adv, mask=mask).argmax(1)
        assert torch.equal(flipped[found], result.flipped_to[found])
    at = reference.robust_radius(model, x, model_kwargs=kwargs, method="fast", batch_size=3)
    fast = rat_ext.robust_radius(model, x, model_kwargs=kwargs, method="fast", batch_size=5)
    torch.testing.assert_close(fast, at)


def test_a_sweep_takes_them():
    x, mask = batch()
    temperatures, kwargs = [0.3, 1.0], {"mask": mask}
    swept = rat_ext.temperature_sweep(Masked(), x, temperatures, model_kwargs=kwargs)
    for t, result in zip(temperatures, swept, strict=True):
        alone = rat_ext.robust_radius(Masked(), x, temperature=t, model_kwargs=kwargs)
        torch.testing.assert_close(result.radius, alone)


def test_the_model_is_left_as_it_was():
    x, mask = batch()
    model = Masked()
    model.train()
    rat_ext.robust_radius(model, x, model_kwargs={"mask": mask})
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


LOADER = [batch(7, seed) for seed in range(3)]


def labelled(x: Tensor, mask: Tensor) -> Tensor:
    target = Masked()(x, mask=mask).argmax(1)
    return torch.where(torch.arange(len(x)) % 3 == 0, (target + 1) % CLASSES, target)


def test_loaders_give_them(tmp_path):
    triples = [(x, labelled(x, mask), {"mask": mask}) for x, mask in LOADER]
    mappings = [{"e": x, "y": t, "m": kwargs["mask"]} for x, t, kwargs in triples]

    def batch_fn(b):
        return b["e"], b["y"], {"mask": b["m"]}

    model = Masked()
    expected = torch.cat([one_by_one(x, mask) for x, mask in LOADER])
    for radii in (
        rat_ext.robust_radii(model, triples, progress=False, **WIDE),
        rat_ext.robust_radii(model, mappings, batch_fn=batch_fn, progress=False, **WIDE),
        rat_ext.robust_radii(
            model, mappings, batch_fn=batch_fn, progress=False, out=tmp_path, **WIDE
        ).load(),
    ):
        torch.testing.assert_close(radii.radius, expected, rtol=2e-2, atol=1e-9, check_dtype=False)
        assert torch.equal(radii.target, torch.cat([t for _, t, _ in triples]))


@pytest.mark.parametrize("name", ["msr", "rel-u", "odin", "rr-bs", "rr-fast", "msr-views"])
def test_scores_and_gates_take_them(name):
    loader = [(x, labelled(x, mask), {"mask": mask}) for x, mask in LOADER] * 3
    options = {"views": [torch.clone]} if name == "msr-views" else {}
    model, score = Masked(), scores.get(name, **options)
    score.fit(model, loader, progress=False)
    x, mask = batch(9, seed=9)
    bound = rat_ext.with_arguments(model, x, {"mask": mask})
    confidence = score.score(bound, x)
    alone = [
        score.score(rat_ext.with_arguments(model, x[i : i + 1], {"mask": mask[i : i + 1]}), row)
        for i, row in enumerate(x.split(1))
    ]
    torch.testing.assert_close(confidence, torch.cat(alone), rtol=6e-2, atol=1e-9)
    how = {"coverage": 0.5, "tune_share": 0.5, "progress": False}
    detector = Detector.fit(model, loader, scores.get(name, **options), **how)
    out = detector(x, model_kwargs={"mask": mask})
    assert torch.equal(out.prediction, model.eval()(x, mask=mask).argmax(1))
    wrapped = [{"b": each} for each in loader]
    again = Detector.fit(
        model, wrapped, scores.get(name, **options), batch_fn=lambda b: b["b"], **how
    )
    assert again.threshold == detector.threshold


def test_the_loss_takes_them():
    x, mask = batch()
    t = torch.arange(12) % CLASSES
    model = Masked()
    loss = RATLoss(0.05)(model, x, t, model_kwargs={"mask": mask}).loss
    expected = RATLoss(0.05)(nn.Sequential(_Bound(model, mask)), x, t).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))


class _Bound(nn.Module):
    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, mask=self.mask)


def test_errors_say_what_to_do():
    x, mask = batch()
    model = Masked()
    with pytest.raises(TypeError, match="model_kwargs is a Tensor; expected a mapping"):
        rat_ext.robust_radius(model, x, model_kwargs=mask)
    with pytest.raises(ValueError, match="mask of model_kwargs is on meta and x on cpu"):
        rat_ext.robust_radius(model, x, model_kwargs={"mask": mask.to("meta")})
    bound = rat_ext.with_arguments(model, x, {"mask": mask})
    assert isinstance(bound, PerSample)
    assert rat_ext.with_arguments(model, x, {}) is model
    with pytest.raises(ValueError, match="called with 3 inputs, and has arguments for 12 samples"):
        bound(x[:3])
    with pytest.raises(ValueError, match="model itself, and model_kwargs here and in each call"):
        RadiusEstimator(bound, x)

    def part(model, x, y):
        model(x[:5])
        return x

    with pytest.raises(ValueError, match=r"called with 5 inputs.*Some attacks of other libraries"):
        rat_ext.robust_radius(model, x, model_kwargs={"mask": mask}, attack=part)


def test_an_attack_of_the_users_gets_the_model_of_its_batch():
    x, mask = batch()

    def attack(model, x, y):
        x = x.clone().requires_grad_()
        model(x).logsumexp(1).sum().backward()
        return (x + 0.1 * x.grad.sign()).detach().clamp(0, 1)

    options = {"attack": attack, "rtol": 1e-4, **WIDE}
    radii = rat_ext.robust_radius(Masked(), x, model_kwargs={"mask": mask}, batch_size=5, **options)
    torch.testing.assert_close(radii, one_by_one(x, mask, **options), rtol=3e-4, atol=1e-9)
