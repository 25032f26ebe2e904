"""rat-ext demo"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import demo
from .inputs import command_line


@dataclass(frozen=True)
class Demo:
    """The method on handwritten digits: a table and an HTML report.

    Trains small networks on scikit-learn's handwritten digits, plainly and with RAT, and tells how
    well MSR, RR-Fast and RR-BS find their wrong predictions.
    """

    out: Path = Path("demo-report")
    """folder to write to"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """random seeds; each trains one pair of networks"""
    train_size: int = 500
    """number of images to train on"""
    epochs: int = 40
    """epochs of training"""
    eps: float = 0.1
    """size of the RAT perturbation"""
    lam: float = 1.0
    """weight of the RAT loss's term"""

    def run(self) -> None:
        experiment = demo.Experiment(
            seeds=self.seeds,
            train_size=self.train_size,
            epochs=self.epochs,
            eps=self.eps,
            lam=self.lam,
        )
        demo.main(experiment, self.out, command=command_line.get())
