"""What an evaluation keeps on disk, so that it can be shared among processes and resumed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from .._common.storage import fingerprint, write_whole
from .._core import __version__
from ..datasets import Labelled
from .settings import Settings


class Cache:
    """Named lists of tensors in a folder; a file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, identity: str, resume: bool) -> None:
        """Start empty, or go on with what there is of the evaluation of this identity."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "evaluation"
        if resume and mark.exists():
            if mark.read_text() != identity:
                raise ValueError(
                    f"{self.folder} is of another model, data set or settings; do not resume, or "
                    "use another output folder"
                )
            return
        for path in self.folder.glob("*.pt"):
            path.unlink()
        mark.write_text(identity)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def __setitem__(self, key: str, tensors: list[Tensor]) -> None:
        write_whole(self._path(key), lambda temporary: torch.save(tensors, temporary))

    def __getitem__(self, key: str) -> list[Tensor]:
        try:
            tensors: list[Tensor] = torch.load(self._path(key), weights_only=True)
        except Exception as error:  # torch.load raises many kinds
            raise ValueError(
                f"{self._path(key)} is damaged; delete it, and resume: it is computed again"
            ) from error
        return tensors


def identity_of(model: nn.Module, data: Labelled, images: int, settings: Settings) -> str:
    """Tells evaluations apart: by weights, three of the images, settings and version."""
    digest = hashlib.sha256(fingerprint(model).encode())
    for index in (0, images // 2, images - 1):
        x, target = data[index]
        digest.update(x.numpy().tobytes() + str(int(target)).encode())
    digest.update(repr((images, settings, __version__)).encode())
    return digest.hexdigest()
