"""Models by name, and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rat_ext import datasets, models


@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.879), (56, 0.896)])
def test_shared_checkpoints_load_and_classify(shared: Path, depth: int, accuracy: float) -> None:
    model = models.create(f"resnet{depth}")
    models.load_weights(model, shared / f"models/cifar10-jpeg-resnet{depth}.pt")
    x, target = datasets.jpeg_archive(shared / "data/cifar10-jpeg-test.npz", 400)[:]
    with torch.inference_mode():
        correct = model.eval()(x).argmax(1) == target
    assert correct.double().mean() == pytest.approx(accuracy, abs=0.05)  # 3 standard errors


@pytest.mark.parametrize(
    ("name", "millions"),  # of He et al. 2016, table 6, and Zagoruyko and Komodakis 2016, table 5
    [("resnet20", 0.27), ("resnet56", 0.85), ("resnet110", 1.7), ("wrn-28-10", 36.5)],
)
def test_built_in_networks_have_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = models.create(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", models.names())
def test_logits_of_any_batch_and_number_of_classes(name: str) -> None:
    if name == "wrn-28-10":
        model = models.Normalized(models.WideResNet(10, 1, 7), *[(0.5,) * 3] * 2)
    else:
        model = models.create(name, 7)
    shape = (1, 8, 8) if name == "digits-cnn" else (3, 32, 32)
    assert model(torch.rand(2, *shape)).shape == (2, 7)


def test_resnet18_is_torchvisions_but_for_the_stem() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = models.ResNet18(num_classes=7)
    weights = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(weights)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_normalisation_is_inside_and_saved() -> None:
    model = models.Normalized(nn.Flatten(), (0.5, 0.25), (0.5, 0.25))
    logits = model(torch.tensor([[[[1.0]], [[0.0]]]]))
    assert torch.equal(logits, torch.tensor([[1.0, -1.0]]))
    assert set(model.state_dict()) == {"mean", "std"}


def test_torchvision_models_by_name() -> None:
    pytest.importorskip("torchvision")
    model = models.create("torchvision:resnet18", 5).eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    assert model.mean.flatten().tolist() == pytest.approx(models.IMAGENET_MEAN)
    with pytest.raises(ValueError, match="torchvision has no classifier named 'resnet19'"):
        models.create("torchvision:resnet19")


def test_timm_models_by_name() -> None:
    pytest.importorskip("timm")
    model = models.create("timm:mobilenetv3_small_050", 5).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    assert model.mean.flatten().tolist() == pytest.approx(models.IMAGENET_MEAN)
    with pytest.raises(ValueError, match="timm has no model named 'resnet19'"):
        models.create("timm:resnet19")


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v2", "classifier.1")],
)
def test_pretrained_torchvision_models_get_a_new_last_layer(
    name: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("torchvision.models")
    state = library.get_model(name).state_dict()
    enum = type(library.get_model_weights(name).DEFAULT)
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **_: state)
    same = models.create(f"torchvision:{name}", 1000, pretrained=True).m
    assert all(torch.equal(value, state[key]) for key, value in same.state_dict().items())
    with pytest.raises(ValueError, match=f"the pretrained {name} has 1000 classes, not 7"):
        models.create(f"torchvision:{name}", 7, pretrained=True)
    model = models.create(f"torchvision:{name}", 7, pretrained=True, new_head=True)
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    for key, value in model.m.state_dict().items():
        if not key.startswith(f"{head}."):
            assert torch.equal(value, state[key]), key


def test_pretrained_timm_models_get_a_new_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    create, name = timm.create_model, "mobilenetv3_small_050"
    path = tmp_path / "weights.pt"
    state = create(name).state_dict()
    torch.save(state, path)
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *args, **how: create(*args, **how, pretrained_cfg_overlay={"file": str(path)}),
    )
    with pytest.raises(ValueError, match=f"the pretrained {name} has 1000 classes, not 5"):
        models.create(f"timm:{name}", 5, pretrained=True)
    model = models.create(f"timm:{name}", 5, pretrained=True, new_head=True).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    for key, value in model.m.state_dict().items():
        if not key.startswith("classifier."):
            assert torch.equal(value, state[key]), key


def test_user_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_abc.py").write_text(
        "import torch\ndef net(classes): return torch.nn.Linear(4, classes)\n"
        "def no_net(classes): return classes\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.create("mine_abc:net", 3)(torch.rand(2, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match="returned a int; expected"):
        models.create("mine_abc:no_net")
    with pytest.raises(ValueError, match="cannot import the model mine_abc:absent"):
        models.create("mine_abc:absent")


def test_errors_of_create() -> None:
    with pytest.raises(ValueError, match="no model is named 'resnet21'; there are digits-cnn"):
        models.create("resnet21")
    with pytest.raises(ValueError, match="load a checkpoint instead"):
        models.create("resnet20", pretrained=True)
    with pytest.raises(ValueError, match=r"depth is 21; it must be 6 n \+ 2"):
        models.CifarResNet(21)


def wrapped(state: dict, layout: str) -> dict:
    if layout == "state_dict":
        return {"state_dict": state, "epoch": 3}
    if layout == "parallel":
        return {"model": {f"module.{key}": value for key, value in state.items()}}
    if layout == "compiled":
        return {f"module._orig_mod.{key}": value for key, value in state.items()}
    if layout == "bare network":
        return {key[2:]: value for key, value in state.items() if key.startswith("m.")}
    return state


@pytest.mark.parametrize(
    "layout", ["plain", "state_dict", "parallel", "compiled", "bare network", "safetensors"]
)
def test_common_checkpoint_layouts(tmp_path: Path, layout: str) -> None:
    source, model = models.create("digits-cnn"), models.create("digits-cnn")
    path = tmp_path / "weights.pt"
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    else:
        torch.save(wrapped(source.state_dict(), layout), path)
    models.load_weights(model, path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_averaged_weights_of_a_run_are_loaded(tmp_path: Path, compiled: bool) -> None:
    trained, averaged, model = (models.create("digits-cnn") for _ in range(3))
    prefix, path = "_orig_mod." if compiled else "", tmp_path / "last.pt"
    ema = {f"module.{prefix}{key}": value for key, value in averaged.state_dict().items()}
    state = {
        "recipe": {"ema": 0.9},
        "model": {prefix + key: value for key, value in trained.state_dict().items()},
        "ema": {"n_averaged": torch.tensor(3), **ema},
    }
    x = torch.rand(2, 1, 8, 8)
    torch.save(state, path)
    models.load_weights(model, path)
    assert torch.equal(model(x), averaged(x))
    torch.save({**state, "ema": None}, path)
    models.load_weights(model, path)
    assert torch.equal(model(x), trained(x))


def test_names_in_either_file_of_a_run(tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.pt", models.create("digits-cnn").state_dict()
    for content, name, classes in [
        ({"state_dict": weights, "model": "digits-cnn", "classes": ["a", "b"]}, "digits-cnn", 2),
        ({"model": weights, "name": "digits-cnn", "classes": ["a", "b"]}, "digits-cnn", 2),
        ({"model": weights, "name": None}, None, 0),
        ({"model": weights}, None, 0),
        (weights, None, 0),
        ([1], None, 0),
    ]:
        torch.save(content, path)
        assert models.name_in(path) == name
        assert models.classes_in(path) == (("a", "b")[:classes] or None)


def test_errors_of_load_weights(tmp_path: Path) -> None:
    model, path = models.create("digits-cnn"), tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        models.load_weights(model, path)
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint of tensors alone"):
        models.load_weights(model, path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no state dict"):
        models.load_weights(model, path)
    torch.save(models.create("resnet20").state_dict(), path)
    with pytest.raises(ValueError, match=r"does not fit DigitsCNN: \d+ keys .* missing, \d+ keys"):
        models.load_weights(model, path)
    torch.save(models.create("digits-cnn", 3).state_dict(), path)
    with pytest.raises(ValueError, match="size mismatch"):
        models.load_weights(model, path)


def test_no_code_is_run_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(models.create("digits-cnn"), path)  # a pickled module: its class would be imported
    with pytest.raises(ValueError, match="is not a checkpoint of tensors alone"):
        models.load_weights(models.create("digits-cnn"), path)


# --- What images go through -----------------------------------------------------------------------


def test_a_built_in_model_takes_images_of_its_size() -> None:
    assert models.preprocessing("digits-cnn") == datasets.Preprocessing((1, 8, 8))
    assert models.preprocessing("resnet20") == datasets.Preprocessing((3, 32, 32))
    assert models.preprocessing("mine:net") is None
    with pytest.raises(ValueError, match="no model is named 'resnet21'; there are digits-cnn"):
        models.preprocessing("resnet21")


def test_images_for_any_timm_model() -> None:
    timm = pytest.importorskip("timm")
    for name in timm.list_models():
        preprocessing = models.preprocessing(f"timm:{name}")
        assert preprocessing.size == timm.get_pretrained_cfg(name).input_size
    with pytest.raises(ValueError, match="timm has no model named 'lenet'"):
        models.preprocessing("timm:lenet")


@pytest.mark.parametrize("name", ["resnet18", "inception_v3", "vit_tiny_patch16_384"])
def test_images_for_a_timm_model(name: str) -> None:
    timm = pytest.importorskip("timm")
    images = pytest.importorskip("PIL.Image")
    model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    preprocessing = models.preprocessing(f"timm:{name}")
    assert preprocessing.size == config["input_size"]
    assert preprocessing.crop == config["crop_pct"]
    assert preprocessing.interpolation == config["interpolation"]
    # The pixels are those of timm's own transform, to the rounding of Pillow's resizing.
    pixels = torch.randint(0, 256, (400, 300, 3), generator=torch.Generator().manual_seed(0))
    image = images.fromarray(pixels.byte().numpy())
    config.update(mean=(0, 0, 0), std=(1, 1, 1))
    expected = timm.data.create_transform(**config)(image)
    assert (preprocessing(image) - expected).abs().max() < 2.01 / 255


def test_images_for_a_torchvision_model() -> None:
    library = pytest.importorskip("torchvision.models")
    imagenet = datasets.Preprocessing((3, 224, 224), 224 / 256)
    assert models.preprocessing("torchvision:resnet50") == imagenet
    for name in library.list_models(module=library):
        preset = library.get_model_weights(name).DEFAULT.transforms()
        preprocessing = models.preprocessing(f"torchvision:{name}", pretrained=True)
        assert preprocessing.size == (3, *preset.crop_size * 2)
        assert preprocessing.resized(800, 1000)[0] == preset.resize_size[0]
        assert preprocessing.interpolation == preset.interpolation.value
    with pytest.raises(ValueError, match="torchvision has no classifier named 'resnet19'"):
        models.preprocessing("torchvision:resnet19")


def test_classes_of_pretrained_weights() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    for name in ("torchvision:resnet50", "timm:resnet50"):
        classes = models.pretrained_classes(name)
        assert len(classes) == 1000
        assert classes[0].startswith("tench")
        assert classes[999].startswith("toilet tissue")
    assert models.pretrained_classes("timm:vit_base_patch16_clip_224.openai") is None  # no head
    assert models.pretrained_classes("resnet20") is models.pretrained_classes("mine:net") is None


def test_the_preprocessing_in_either_file_of_a_run(tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.pt", models.create("digits-cnn").state_dict()
    preprocessing = datasets.Preprocessing((1, 8, 8), 0.9, "bicubic")
    values = preprocessing.to_dict()
    for content, expected in [
        ({"state_dict": weights, "model": "digits-cnn", "preprocessing": values}, preprocessing),
        ({"model": weights, "name": "digits-cnn", "preprocessing": values}, preprocessing),
        ({"model": weights, "preprocessing": None}, None),
        ({"model": weights}, None),
        (weights, None),
        ([1], None),
    ]:
        torch.save(content, path)
        assert models.preprocessing_in(path) == expected
    torch.save({"model": weights, "preprocessing": {**values, "crop": 2}}, path)
    with pytest.raises(ValueError, match=r"is no preprocessing: crop is 2\.0"):
        models.preprocessing_in(path)
