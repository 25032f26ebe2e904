"""Batches of every kind, wherever a loader is taken."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from helpers import RowExact, uniform

from rat_ext import Detector, robust_radii, scores
from rat_ext._common.loaders import inputs_and_targets

X, T = uniform(40, 12), torch.arange(40) % 4


def as_mapping(rows):
    """As a collator of transformers gives it: a UserDict."""
    return UserDict(pixel_values=torch.stack([x for x, _ in rows]), labels=[t for _, t in rows])


def loaders():
    data = torch.utils.data.TensorDataset(X, T)
    plain = torch.utils.data.DataLoader(data, batch_size=16)
    rows = [(x, int(t)) for x, t in data]
    return plain, torch.utils.data.DataLoader(rows, batch_size=16, collate_fn=as_mapping)


@pytest.mark.parametrize("on_disk", [False, True])
def test_radii_of_mappings(on_disk, tmp_path):
    plain, mappings = loaders()
    expected = robust_radii(RowExact(), plain, progress=False)
    out = {"out": tmp_path / "run"} if on_disk else {}
    radii = robust_radii(RowExact(), mappings, progress=False, **out)
    radii = radii.load() if on_disk else radii
    for a, b in zip(radii, expected, strict=True):
        assert torch.equal(a, b)
    unlabelled = robust_radii(RowExact(), [{"pixel_values": X}], progress=False)
    assert unlabelled.target is None
    assert torch.equal(unlabelled.radius, expected.radius)


def test_fits_on_mappings():
    plain, mappings = loaders()
    odin = [scores.get("odin").fit(RowExact(), each, progress=False) for each in (plain, mappings)]
    assert odin[0].temperature == odin[1].temperature
    fits = [
        Detector.fit(RowExact(), each, score="rr-fast", coverage=0.5, progress=False)
        for each in (plain, mappings)
    ]
    assert fits[0].report == fits[1].report


def test_batches_that_say_too_little():
    with pytest.raises(
        ValueError, match=r"keys 'input_ids', 'mask'; expected 'pixel_values'.*coll"
    ):
        inputs_and_targets({"input_ids": X, "mask": X})
    with pytest.raises(TypeError, match=r"inputs are a list; expected a torch\.Tensor"):
        inputs_and_targets(([1, 2], T))
    with pytest.raises(ValueError, match="'pixel_values' and 'labels': fitting needs the targets"):
        scores.get("odin").fit(RowExact(), [{"pixel_values": X}], progress=False)


@pytest.mark.parametrize("on_disk", [False, True])
def test_batch_fn_reads_other_batches(on_disk, tmp_path):
    plain, _ = loaders()
    expected = robust_radii(RowExact(), plain, progress=False)
    odd = torch.utils.data.DataLoader(
        [{"image": x, "class": t} for x, t in zip(X, T, strict=True)], batch_size=16
    )
    out = {"out": tmp_path / "run"} if on_disk else {}
    for loader in (odd, iter(odd)):  # batches by number, and one after the other
        radii = robust_radii(
            RowExact(),
            loader,
            batch_fn=lambda batch: (batch["image"], batch["class"]),
            progress=False,
            **out,
        )
        radii = radii.load() if on_disk else radii
        for a, b in zip(radii, expected, strict=True):
            assert torch.equal(a, b)
        out = {"out": tmp_path / "again"} if on_disk else {}
