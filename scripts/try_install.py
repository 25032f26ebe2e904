"""Tries the installed package by searches whose radius is known, as each wheel is before it ships.

python scripts/try_install.py [--cuda]    --cuda: the core must hold CUDA kernels
"""

from __future__ import annotations

import sys

import torch

import rat_ext


class Plane(torch.nn.Module):
    """Class 0 where the coordinates add up to more than 1.6."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.sum(dim=1) - 1.6
        return torch.stack([score, -score], dim=1)


def main(arguments: list[str]) -> None:
    info = rat_ext.build_info()
    if ("--cuda" in arguments) != (info.cuda is not None):
        sys.exit(f"CUDA in the core: {info.cuda or info.cuda_reason}")
    x = torch.full((3, 4), 0.5)  # at (4 * 0.5 - 1.6) / 4 = 0.1 in the maximum norm from the plane
    for method in ("bs", "fast"):
        radius = rat_ext.robust_radius(Plane(), x, method=method, rtol=1e-3)
        torch.testing.assert_close(radius, torch.full((3,), 0.1), rtol=1e-3, atol=0.0)
    print(f"rat_ext {info.version} finds the radii ({rat_ext.__file__})")


if __name__ == "__main__":
    main(sys.argv[1:])
