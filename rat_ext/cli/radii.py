"""rat-ext radii"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..radius import robust_radii
from ..search.options import OPTIONS
from .inputs import Classifier, Data, Device, Flag, search, searched

if TYPE_CHECKING:
    Search = Any
else:  # the batch size is that of the loader
    Search = search(*(name for name in OPTIONS if name != "batch_size"))


@dataclass(frozen=True)
class Radii:
    """The robust radius of every image of a data set, to files.

    Writes radii, predictions and targets to the output folder, in files of some batches each;
    rat_ext.RadiusShards reads them. On several devices: torchrun --nproc-per-node=2 -m rat_ext
    radii ...
    """

    after_interrupt: ClassVar[str] = "; with --resume the command goes on"

    out: Path
    """folder to write to"""
    images: Data
    classifier: Classifier = field(default_factory=Classifier)
    split: Literal["test", "train"] = "test"
    """which part of the data set"""
    batch_size: int = 250
    """images in a batch"""
    batches_per_shard: int = 16
    """batches whose results share a file"""
    format: Literal["npz", "parquet"] = "npz"
    """format of the files"""
    resume: Flag = False
    """go on with a run that was interrupted"""
    where: Device = field(default_factory=Device)
    search: Search = field(default_factory=Search)

    def run(self) -> None:
        data, _ = self.images.load(self.split, known=self.classifier.preprocessing)
        model = self.classifier.load(len(data.classes))
        with self.where.use() as (device, rank):
            shards = robust_radii(
                model.to(device),
                self.images.loader(data, self.batch_size, device),
                out=self.out,
                resume=self.resume,
                batches_per_shard=self.batches_per_shard,
                format=self.format,
                **searched(self.search),
            )
        if rank:
            return
        radii = shards.load()
        assert radii.target is not None  # data sets have targets
        right = radii.prediction.eq(radii.target)
        print(f"Accuracy {100 * right.double().mean():.2f} % of {len(right):,} images.")
        for name, which in (("right", right), ("wrong", ~right)):
            if which.any():
                median = radii.radius[which].median()
                print(f"Median radius of the {name} predictions: {median:.4g}")
        print(f"Radii: {self.out}, {len(shards)} {self.format} file(s)")
