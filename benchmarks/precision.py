"""How far TF32, autocast and half precision move radii, on CIFAR-10 and ResNet-20.

    python benchmarks/precision.py --shared DIR --out benchmarks/results/precision.json

A radius is that of the model as torch runs it. Here the same model is run in other precisions, and
its radii (RR-BS, rtol 2^-10) are compared with those in float64: how many are off by more than 1 or
2 %, the median of the relative difference, and the AURC of the radius as a confidence, which only
asks for the order. TF32, in which a GPU of NVIDIA's Ampere or later multiplies float32 numbers, is
emulated: the operands of convolutions and matrix products, forward and backward, are rounded to 10
bits of mantissa, and sums are in float32.
"""

import argparse
import contextlib
import copy
import json
import warnings
from pathlib import Path

import torch
from common import load_model, load_test_images, shared_folder
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

from rat_ext import metrics, robust_radius

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
}
RTOL = 2.0**-10


def rounded(value: object) -> object:
    """A float32 tensor with 10 bits of mantissa, to nearest even; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


class TF32(TorchDispatchMode):
    """Emulates TF32 products on any device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            # The bias, or what a matrix product is added to, is not multiplied.
            skip = {aten.convolution.default: 2, aten.addmm.default: 0}.get(function)
            args = [a if i == skip else rounded(a) for i, a in enumerate(args)]
        return function(*args, **(kwargs or {}))


def measure(
    model, x, context=contextlib.nullcontext, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).to(dtype)
    parts = []
    with warnings.catch_warnings(), context():
        warnings.filterwarnings("ignore", ".*wider than rtol")
        for rows in tqdm(x.to(dtype).split(250), leave=False, unit="batch"):
            parts.append(robust_radius(model, rows, rtol=RTOL, full=True))
    names = ("radius", "found", "resolved", "prediction")
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.shared, arguments.model)
    x, target = load_test_images(arguments.shared, arguments.images)
    exact = measure(model, x, dtype=torch.float64)
    runs = {
        "float64": exact,
        "float32": measure(model, x),
        "TF32 (emulated)": measure(model, x, TF32),
        "autocast to bfloat16": measure(model, x, lambda: torch.autocast("cpu", torch.bfloat16)),
        "float16 model and inputs": measure(model, x, dtype=torch.float16),
        "bfloat16 model and inputs": measure(model, x, dtype=torch.bfloat16),
    }
    report = {}
    print(f"{arguments.model}, {len(x)} test images, rtol 2^-10")
    print("precision                   > 1 %   > 2 %   median    AURC x1000   resolved")
    for name, run in runs.items():
        both = run["found"] & exact["found"]
        difference = (run["radius"][both].double() / exact["radius"][both] - 1).abs()
        confidence = run["radius"].double().nan_to_num(nan=-torch.inf, posinf=torch.inf)
        row = {
            "off by > 1 %": (difference > 0.01).double().mean().item(),
            "off by > 2 %": (difference > 0.02).double().mean().item(),
            "median difference": difference.median().item(),
            "aurc": metrics.aurc(confidence, run["prediction"] == target),
            "resolved": run["resolved"].double().mean().item(),
        }
        report[name] = row
        print(
            f"{name:26s} {100 * row['off by > 1 %']:5.1f} % {100 * row['off by > 2 %']:5.1f} %  "
            f"{100 * row['median difference']:6.3f} %  {1000 * row['aurc']:8.2f}   "
            f"{100 * row['resolved']:6.1f} %"
        )
    if arguments.out:
        settings = {"model": arguments.model, "images": len(x), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({**settings, "runs": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
