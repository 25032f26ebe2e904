"""How many float32 radii are right, against the float64 reference, on CIFAR-10.

    python benchmarks/agreement.py --shared DIR

DIR has data/cifar10-jpeg-test.npz and models/cifar10-jpeg-resnet20.pt. "Off" are the images whose
float32 radius differs by more than 1 % from that of `rat_ext.reference` in float64. "Textbook
gradient" is a search in float32 on the ray of the cross-entropy's own gradient, which rounds to 0
where the model is confident.

A ray may cross the boundary more than once; then two searches may differ and both be right. The
last column counts, of the images that are off, those where a float64 scan of the ray at 400 radii,
up to 8 times as far, sees the prediction change just once.
"""

import argparse
import copy
from unittest import mock

import torch
from common import load_model, load_test_images, shared_folder

import rat_ext
from rat_ext import reference
from rat_ext.search.checked import Options

RTOL = 2.0**-10


def textbook_radii(model, x, temperature):
    """float32 bisection on the ray that the cross-entropy's gradient gives."""

    def direction(model, x, temperature, *_):
        z = model(x)
        y = z.argmax(1)
        return reference.textbook_direction(model, x, y, temperature), z, y

    with mock.patch.object(reference, "fgsm_direction", direction):
        return reference.robust_radius(model, x, rtol=RTOL, temperature=temperature, batch_size=250)


@torch.no_grad()
def changes_once(model, x, radii, temperature):
    """(N,) bool: on a scan up to 8 radii far, the prediction leaves y once and stays away."""
    direction, _, y = reference.fgsm_direction(model, x, temperature)
    options = Options.checked(x)
    changed = []
    for share in torch.linspace(0, 8, 401)[1:]:
        eps = (share * radii).clamp_max(options.eps_max)
        changed.append(model(reference.on_ray(x, direction, eps, options)).argmax(1) != y)
    flips = torch.stack(changed)
    return (flips[1:] != flips[:-1]).sum(0) <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--images", type=int, default=1000)
    arguments = parser.parse_args()
    model = load_model(arguments.shared, "resnet20")
    exact = copy.deepcopy(model).double()
    x, _ = load_test_images(arguments.shared, arguments.images)
    print(f"ResNet-20, {len(x)} test images, rtol 2^-10")
    print("   T  search                       off by > 1 %   of these, on a ray that crosses once")
    for temperature in (1.0, 0.2):
        options = {"rtol": RTOL, "temperature": temperature, "batch_size": 250}
        expected = reference.robust_radius(exact, x.double(), **options)
        searches = {
            "rat_ext": rat_ext.robust_radius(model, x, **options),
            'rat_ext, search="bisect"': rat_ext.robust_radius(model, x, search="bisect", **options),
            "textbook gradient": textbook_radii(model, x, temperature),
        }
        for name, radii in searches.items():
            off = ~torch.isclose(radii.double(), expected, rtol=1e-2, atol=0)
            single = ""
            if name != "textbook gradient":
                once = changes_once(exact, x[off].double(), expected[off], temperature)
                single = int(once.sum())
            count, share = int(off.sum()), 100 * off.double().mean()
            print(f"{temperature:4.1f}  {name:27s} {count:4d} = {share:4.1f} %   {single}")


if __name__ == "__main__":
    main()
