"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from .. import scores


@dataclass(frozen=True)
class Settings:
    """Of an evaluation."""

    scores: tuple[str, ...] = ()
    """Names in the registry of `rat_ext.scores`; none for all of them."""
    splits: int = 5
    """Random splits into a part that settings are chosen on and a part that is tested on."""
    validation_share: float = 0.2
    """Of the images, in each split."""
    tune: str = "all"
    """What is chosen on the validation part: "all" (temperatures and input perturbations),
    "temperature", or "none" (temperature 1, no perturbation)."""
    seed: int = 0
    """Of the splits."""
    batch_size: int = 250

    def __post_init__(self) -> None:
        for name in self.scores:
            scores.get(name)
        for name in ("splits", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share is {self.validation_share}; it must be between 0 and 1"
            )
        if self.tune not in ("all", "temperature", "none"):
            raise ValueError(f"tune is {self.tune!r}; expected 'all', 'temperature' or 'none'")

    def create(self, name: str) -> scores.Score:
        """A new score, with the grid that this evaluation lets it choose from."""
        score = scores.get(name)
        if isinstance(score, scores.TunedScore):
            if self.tune == "none":
                score = scores.get(name, temperature=1.0)
            elif self.tune == "temperature" and any(s.perturbation for s in score.grid):
                score = scores.get(name, perturbation=0.0)
        return score
