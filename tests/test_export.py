"""RR-Fast as a graph: saved and loaded by torch, and run by ONNX Runtime."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import WithLogits, cnn, mlp, uniform
from torch import Tensor, nn

from rat_ext import export, models, robust_radius
from rat_ext.export import export_onnx, export_radius


def expected(model: nn.Module, x: Tensor, **options) -> tuple[Tensor, Tensor]:
    result = robust_radius(model, x, method="fast", full=True, **options)
    return result.prediction, result.radius


def saved_and_loaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    ("model", "shape", "dtype", "options"),
    [
        (mlp(), (12,), torch.float64, {"temperature": 0.5, "h": 1e-4}),
        (WithLogits(mlp()), (12,), torch.float64, {}),
        (cnn(), (3, 8, 8), torch.float32, {"bounds": (-1, 2)}),
        (models.create("digits-cnn"), (1, 8, 8), torch.float32, {}),
    ],
    ids=["mlp", "with logits", "cnn", "digits-cnn"],
)
def test_equals_robust_radius_after_saving(model, shape, dtype, options) -> None:
    example, x = uniform(1, *shape, dtype=dtype), uniform(9, *shape, seed=1, dtype=dtype)
    training = [module.training for module in model.modules()]
    program = export_radius(model, example, **options)
    assert [module.training for module in model.modules()] == training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    run = saved_and_loaded(program)
    for rows in (9, 1, 4):
        prediction, radius = expected(model, x[:rows], **options)
        outputs = run(x[:rows])
        assert torch.equal(outputs[0], prediction)
        assert outputs[1].dtype == radius.dtype
        torch.testing.assert_close(outputs[1], radius, rtol=1e-4, atol=0)
        assert not outputs[1].requires_grad


def test_the_weights_are_in_the_graph() -> None:
    model, x = mlp(), uniform(5, 12)
    run = saved_and_loaded(export_radius(model, x))
    prediction, radius = expected(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(x)[0], prediction)
    torch.testing.assert_close(run(x)[1], radius, rtol=1e-9, atol=0)


def test_rows_that_have_no_radius() -> None:
    model, x = mlp(), uniform(5, 12)
    run = export_radius(model, x).module()
    alone = run(x)
    bad = x.clone()
    bad[1, 3], bad[3, 0], bad[4, 7] = math.nan, 1.01, math.inf
    prediction, radius = run(bad)
    assert prediction[[1, 3, 4]].tolist() == [-1] * 3
    assert radius[[1, 3, 4]].isnan().all()
    assert torch.equal(radius[[0, 2]], alone[1][[0, 2]])
    flat = nn.Linear(12, 3).double()
    nn.init.zeros_(flat.weight)
    assert export_radius(flat, x).module()(x)[1].isinf().all()


class FixesTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(len(x), 12))


def test_a_fixed_batch() -> None:
    model, x = FixesTheBatch(), uniform(4, 12)
    with pytest.raises(ValueError, match=r"fixes the batch size.* dynamic_batch=False"):
        export_radius(model, x)
    run = export_radius(model, x, dynamic_batch=False).module()
    torch.testing.assert_close(run(x)[1], expected(model, x)[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("example", "options", "error", "message"),
    [
        (uniform(2, 12) + 1, {}, ValueError, "outside bounds"),
        (uniform(0, 12), {}, ValueError, "has no rows"),
        (uniform(2, 12) * math.nan, {}, ValueError, "not finite"),
        (uniform(2, 12), {"temperature": 0}, ValueError, "temperature is 0"),
        (uniform(2, 12), {"rtol": 0.1}, TypeError, "has no option rtol"),
    ],
)
def test_errors(example: Tensor, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        export_radius(mlp(), example, **options)
    with pytest.raises(TypeError, match="model is a function"):
        export_radius(lambda x: x, uniform(2, 12))


@pytest.mark.skipif(not export.ONNX_EXPORTS_PROGRAMS, reason="torch.onnx of this torch is older")
def test_onnx_runtime_gets_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(  # of the operations whose backward ONNX does not know
        nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2),
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 7 * 7, 5),
    ).eval()
    x = uniform(6, 2, 14, 14, dtype=torch.float32)
    export_onnx(model, x[:1], tmp_path / "radius.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "radius.onnx")
    for rows in (6, 1):
        prediction, radius = session.run(["prediction", "radius"], {"x": x[:rows].numpy()})
        known = expected(model, x[:rows])
        assert prediction.tolist() == known[0].tolist()
        # A gap's fall over the step h is a difference of float32 logits.
        torch.testing.assert_close(torch.from_numpy(radius), known[1], rtol=1e-3, atol=0)


def test_onnx_needs_a_torch_that_exports_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "ONNX_EXPORTS_PROGRAMS", False)
    with pytest.raises(ImportError, match=r"need torch 2\.5 or newer, and this is "):
        export_onnx(mlp(), uniform(2, 12), tmp_path / "radius.onnx")


def test_onnx_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[onnx\]'"):
        export_onnx(mlp(), uniform(2, 12), tmp_path / "radius.onnx")
