"""Detectors saved and loaded: to the bit, for one model, of own scores, from older versions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from detector_helpers import FAST, Counting, fit, labelled, loader, same
from helpers import RowExact
from torch import Tensor, nn

from rat_ext import Cascade, Detector, scores
from rat_ext._common.storage import fingerprint
from rat_ext.scores import registry

SAVED = {
    **{name: name for name in scores.names()},
    "odin, one setting": scores.get("odin", temperature=2.0, perturbation=0.1 / 3, bounds=(-1, 2)),
    "radius, options": scores.get("rr-bs", rtol=0.1, bounds=(-0.5, 1.5), search="bisect", **FAST),
    "cascade": Cascade("rel-u", "rr-bs", max_changed=0.1),
    "cascade, no band": Cascade("msr", "margin", max_changed=0.9),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_is_equal_to_the_bit(name: str, tmp_path: Path) -> None:
    model, path = Counting(), tmp_path / "detector.safetensors"
    detector = fit(SAVED[name], model, tpr=0.8, calibrate=name != "msr")
    detector.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = Detector.load(path, model)
    assert loaded.report == detector.report
    x, _ = labelled(60, seed=1)
    one, other = detector(x), loaded(x)
    for field in ("prediction", "confidence", "accepted", "probability"):
        assert same(getattr(one, field), getattr(other, field)), field
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_detector_is_for_one_model(tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    model = Counting()
    fit("msr", model).save(path)
    assert Detector.load(path, nn.ModuleDict({"module": model})) is not None  # as DDP wraps it
    other = Counting()
    other.norm.num_batches_tracked += 1
    with pytest.raises(ValueError, match=r"other weights than this Counting.*strict=False"):
        Detector.load(path, other)
    assert Detector.load(path, other, strict=False)(labelled(3)[0]).prediction.shape == (3,)
    with pytest.raises(ValueError, match=r"callable that is no nn.Module.*strict=False"):
        Detector.load(path, lambda x: model(x))
    fit("msr", lambda x: RowExact()(x)).save(path)
    with pytest.raises(ValueError, match="cannot be checked"):
        Detector.load(path, model)


def test_fingerprints_are_of_names_types_and_values() -> None:
    model = nn.Linear(2, 3)
    same_weights = nn.Linear(2, 3)
    same_weights.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(same_weights)
    assert fingerprint(nn.Sequential(model)) != fingerprint(model)
    assert fingerprint(model.double()) != fingerprint(same_weights)
    assert len(fingerprint(nn.Linear(2, 3).bfloat16())) == 64


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_frozen_models_are_told_apart_by_their_constants(tmp_path: Path) -> None:
    def frozen(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)
        return torch.jit.freeze(torch.jit.script(nn.Sequential(*layers).eval()))

    model = frozen(0)
    assert not model.state_dict()
    assert fingerprint(model) != fingerprint(frozen(1))
    assert fingerprint(nn.Sequential(model)) != fingerprint(nn.Sequential(frozen(1)))
    torch.jit.save(model, tmp_path / "model.pt")
    assert fingerprint(model) == fingerprint(torch.jit.load(tmp_path / "model.pt"))
    listed = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2)])})  # without a forward
    assert len(fingerprint(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))) == 64
    assert len(fingerprint(listed)) == 64


def test_scores_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"

    class Scaled(scores.LogitScore):
        def __init__(self, scale: float = 1.0) -> None:
            self.scale = scale

        def score_logits(self, logits: Tensor) -> Tensor:
            return self.scale * logits.amax(1)

    class Saved(Scaled):
        def state(self) -> dict:
            return {"scale": self.scale}

    class Plain(scores.Score):
        def score(self, model: nn.Module, x: Tensor) -> Tensor:
            return x.sum(1)

    class Inherits(scores.Energy):
        def __init__(self, shift: float = 0.0) -> None:
            super().__init__()
            self.shift = shift

    with pytest.raises(ValueError, match="a Plain cannot be saved: its class is not registered"):
        fit(Plain()).save(path)
    own = {"own-scaled": Scaled, "own-saved": Saved, "own-plain": Plain, "own-inherits": Inherits}
    try:
        for name, cls in own.items():
            scores.register(name)(cls)
        for score in (Scaled(2.0), Inherits(1.0)):
            with pytest.raises(ValueError, match=r"defines __init__\(\), but not state\(\)"):
                fit(score).save(path)
        with pytest.raises(ValueError, match="JSON"):
            fit(Saved(math.inf)).save(path)
        assert not path.exists()
        for score in (Saved(2.0), Plain()):
            detector = fit(score)
            detector.save(path)
            x, _ = labelled(20, seed=1)
            out = Detector.load(path, Counting())(x)
            assert same(out.confidence, detector(x).confidence)
            assert torch.equal(out.prediction, RowExact()(x).argmax(1))
    finally:
        for name in own:
            registry._registry.pop(name, None)
    with pytest.raises(ValueError, match=r"'own-plain'; .*import the module that registers it"):
        Detector.load(path, Counting())


def test_what_is_not_a_detector(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="there is no detector"):
        Detector.load(path, RowExact())
    path.write_bytes(b"not tensors, whatever they say")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Detector.load(path, RowExact())
    safetensors.torch.save_file(RowExact().state_dict(), path)
    with pytest.raises(ValueError, match=r"is not a detector; Detector.save writes them"):
        Detector.load(path, RowExact())
    header = {"rat_ext.detector": json.dumps({"version": 99})}
    safetensors.torch.save_file({}, path, header)
    with pytest.raises(ValueError, match="version 99 of the format, this rat_ext reads up to 2"):
        Detector.load(path, RowExact())


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fit("rel-u", calibrate=True).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a safetensors .* fit the detector again"):
            Detector.load(path, Counting())
    path.write_bytes(whole)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["rat_ext.detector"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def refused(text: str, tensors: dict[str, Tensor]) -> None:
        safetensors.torch.save_file(tensors, path, {"rat_ext.detector": text})
        with pytest.raises(ValueError, match=r"file is damaged.*: fit the detector again"):
            Detector.load(path, Counting())

    def without(kept: dict, key: str) -> dict:
        return {name: value for name, value in kept.items() if name != key}

    for text in ("", "[]", "null", json.dumps(header)[:-9]):
        refused(text, tensors)
    for key in header:
        refused(json.dumps(without(header, key)), tensors)
    for part in ("report", "score"):
        for key in header[part].keys() - {"compared"}:  # which older files do not have
            refused(json.dumps({**header, part: without(header[part], key)}), tensors)
    for key in ("probability.values", "score.matrix"):
        refused(json.dumps(header), without(tensors, key))
    older = {**header, "report": without(header["report"], "compared")}
    safetensors.torch.save_file(tensors, path, {"rat_ext.detector": json.dumps(older)})
    assert Detector.load(path, Counting()).report.compared is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("older")
    monkeypatch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex="full"))
    (tmp_path / ".file.tmp-full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"written to .*file: No space left.*; free some space"):
        fit("msr").save(path)
    assert path.read_text() == "older"
    with pytest.raises(FileNotFoundError, match=r"cannot be written to .*absent/file: No such"):
        fit("msr").save(tmp_path / "absent" / "file")


def test_a_score_of_ones_own_that_holds_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @scores.register("own-sum")
    class Sum(scores.Score):
        def __init__(self, first: scores.Score, second: scores.Score) -> None:
            self.first, self.second = first, second

        def state(self) -> dict:
            return {"first": self.first, "second": self.second}

        def score(self, model: nn.Module, x: Tensor) -> Tensor:
            return self.first.score(model, x) + self.second.score(model, x)

    learnt = scores.get("rel-u").fit(Counting(), loader(seed=3), progress=False)
    detector = fit(Cascade("msr", Sum(learnt, Sum(scores.MSR(), scores.Margin()))))
    detector.save(tmp_path / "file")
    loaded = Detector.load(tmp_path / "file", Counting())
    assert type(loaded.score.expensive.second.second) is scores.Margin
    assert same(loaded.score.expensive.first.matrix, learnt.matrix)
    x, _ = labelled(60, seed=1)
    assert same(loaded(x).confidence, detector(x).confidence)


def test_files_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "file"
    report = {
        "criterion": "tpr", "value": 0.8, "delta": 0.001, "threshold": "0.25", "samples": 318,
        "tuned_on": 82, "right": 240, "accepted": 255, "errors": 63, "coverage_bound": 0.7,
        "risk_bound": 0.4, "cascade": None,
    }  # fmt: skip
    saved = {
        "examined": 0.3, "changed": 0.01, "forward_rows": 2.2, "backward_rows": 0.3,
        "expensive_forward_rows": 4.8, "expensive_backward_rows": 1.0,
    }  # fmt: skip
    relu = {"name": "rel-u", "state": {"temperature": 0.2, "weight": 0.5}}
    radius = {"name": "rr-bs", "state": {"temperature": 1.0, "rtol": 0.1}}
    matrix = torch.full((4, 4), 0.5).double()

    def write(score: dict, tensors: dict[str, Tensor], cascade: dict | None = None) -> None:
        header = {
            "version": 1,
            "fingerprint": fingerprint(Counting()),
            "score": score,
            "report": {**report, "cascade": cascade},
        }
        safetensors.torch.save_file(tensors, path, {"rat_ext.detector": json.dumps(header)})

    write(relu, {"score.matrix": matrix})
    detector = Detector.load(path, Counting())
    assert torch.equal(detector.score.matrix, matrix)
    assert (detector.threshold, detector.report.samples) == (0.25, 318)

    cascade = {"cheap": relu, "expensive": radius, "band": ["-inf", "-0.008"], "max_changed": 0.1}
    write(cascade, {"score.cheap.matrix": matrix}, saved)
    detector = Detector.load(path, Counting())
    assert type(detector.score) is Cascade
    assert (detector.score.band, detector.score.max_changed) == ((-math.inf, -0.008), 0.1)
    assert torch.equal(detector.score.cheap.matrix, matrix)
    assert detector.score.expensive.options == {"rtol": 0.1}
    assert detector.report.cascade.examined == 0.3
