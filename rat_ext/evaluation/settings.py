"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from ..scores.base import Score, Setting
from ..scores.registry import get, kind_of, names


@dataclass(frozen=True)
class Settings:
    """Of an evaluation."""

    scores: tuple[str, ...] = ()
    """Names in the registry of `rat_ext.scores`; none for all of them."""
    splits: int = 5
    """Number of random splits into a part that settings are chosen on, and one to test on."""
    validation_share: float = 0.2
    """Share of the images that settings are chosen on, in each split. 0: all are tested on, for
    scores with nothing to choose."""
    tune: str = "all"
    """What is chosen on the validation part: "all" (temperatures and input perturbations),
    "temperature", or "none" (temperature 1, no perturbation)."""
    seed: int = 0
    """Seed of the random splits."""
    batch_size: int = 250
    """Images in a batch."""

    def __post_init__(self) -> None:
        for name in self.scores:
            if kind_of(name).needs_threshold:
                raise ValueError(f"{name!r} is fitted to the threshold of a detector; leave it out")
        for name in ("splits", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.validation_share < 1:
            raise ValueError(
                f"validation_share is {self.validation_share}; it must be at least 0 and below 1"
            )
        if self.tune not in ("all", "temperature", "none"):
            raise ValueError(f"tune is {self.tune!r}; expected 'all', 'temperature' or 'none'")

        if not self.validation_share:
            for name in self.scores or names():
                if self.create(name).needs_fit:
                    raise ValueError(
                        f"validation_share is 0, which leaves no images to fit {name!r} on"
                    )

    def create(self, name: str) -> Score:
        """A new score, with the grid that this evaluation lets it choose from."""
        score = get(name)
        if self.tune == "none":
            return score.limited_to([Setting(1.0, 0.0)])
        if self.tune == "temperature":
            unperturbed = [setting._replace(perturbation=0.0) for setting in score.grid]
            return score.limited_to(list(dict.fromkeys(unperturbed)))
        return score
