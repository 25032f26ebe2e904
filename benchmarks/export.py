"""How far RR-Fast in ONNX Runtime is from the package, and both from float64.

    pip install '.[onnx]' onnxruntime
    python benchmarks/export.py --shared DIR

The CIFAR ResNet-20 and test images of DIR; see docs/guide/export.md.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from common import load_model, load_test_images, shared_folder

import rat_ext
from rat_ext import export, reference


def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    model = load_model(arguments.shared, "resnet20")
    x, _ = load_test_images(arguments.shared, arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "radius.onnx"
        export.export_onnx(model, x[:2], file)
        session = onnxruntime.InferenceSession(file)
        _, radius = session.run(None, {"x": x.numpy()})
    in_onnx = torch.from_numpy(radius).double()
    ours = rat_ext.robust_radius(model, x, method="fast").double()
    exact = reference.robust_radius(copy.deepcopy(model).double(), x.double(), method="fast")
    print(f"ResNet-20, {len(x)} test images, RR-Fast: relative differences, median and largest")
    for name, radii, other in (
        ("ONNX Runtime from rat_ext", in_onnx, ours),
        ("ONNX Runtime from float64", in_onnx, exact),
        ("rat_ext from float64", ours, exact),
    ):
        difference = ((radii - other) / other).abs()[other.isfinite()]
        print(f"{name:26s} {difference.median():.1e}  {difference.max():.1e}")


if __name__ == "__main__":
    main()
