"""A gate for predictions: which of a classifier's predictions to act on.

    detector = Detector.fit(model, held_out_loader, "rr-bs", target_risk=0.05)
    out = detector(x)
    out.prediction[out.accepted]  # at most 5 % of these are wrong

The threshold is chosen on held-out data by a risk, a coverage or a share of right predictions that
is to be kept. A target risk is guaranteed in the sense of Geifman and El-Yaniv, "Selective
Classification for Deep Neural Networks" (NeurIPS 2017): see `Detector.fit`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import scores
from ._model import Model, fingerprint
from ._split import Split
from ._threshold import Rule, upper_bound
from .cascade import Cascade, own
from .scores import Score, labelled_batches

_KEY, _VERSION = "rat_ext.detector", 1  # of the metadata in a detector's file
_EXTRA = "pip install 'rat-ext[detector]'"


@dataclass(frozen=True)
class Decision:
    """What a `Detector` says of N inputs. Every tensor has shape (N,) and is on their device."""

    prediction: Tensor
    """int64: the model's prediction; -1 where the confidence is nan."""
    confidence: Tensor
    """The score's; nan where the input or the logits are not finite."""
    accepted: Tensor
    """bool: the confidence reaches the threshold. Never where it is nan."""
    probability: Tensor | None = None
    """Estimate of the probability that the prediction is right, nan where the confidence is; None
    if the detector was not fitted with ``calibrate=True``."""

    def __len__(self) -> int:
        return len(self.prediction)


@dataclass(frozen=True)
class CascadeReport:
    """What a `Cascade` saved on the held-out data, per sample."""

    examined: float
    """Share of the samples that the expensive score was needed for."""
    changed: float
    """Share of the samples decided otherwise than by the expensive score alone, at the same
    threshold."""
    forward_rows: float
    """Rows through the model forward that the cascade takes."""
    backward_rows: float
    expensive_forward_rows: float
    """Rows that the expensive score alone takes."""
    expensive_backward_rows: float


@dataclass(frozen=True)
class DetectorReport:
    """The threshold of a `Detector`, and what it did on the data that chose it.

    The bounds are one-sided Clopper-Pearson bounds. That of the risk under a target_risk holds as
    `Detector.fit` says, over the choice of the threshold; the others as if it had been fixed
    before.
    """

    criterion: str
    """What was asked for: "target_risk", "coverage" or "tpr"."""
    value: float
    """How much of it."""
    delta: float
    """Each bound fails with at most this probability."""
    threshold: float
    """The least confidence that is accepted."""
    samples: int
    """Held-out samples that chose the threshold."""
    tuned_on: int
    """Other held-out samples, that the score was fitted on."""
    right: int
    """Of the samples: predicted right."""
    accepted: int
    """Of the samples: accepted."""
    errors: int
    """Of the accepted ones: predicted wrong."""
    coverage_bound: float
    """The coverage on new data is at least this."""
    risk_bound: float
    """The risk on new data is at most this."""
    cascade: CascadeReport | None = None

    @property
    def coverage(self) -> float:
        """Share of the samples that is accepted."""
        return self.accepted / self.samples

    @property
    def risk(self) -> float:
        """Error rate of the accepted samples."""
        return self.errors / self.accepted

    @property
    def tpr(self) -> float:
        """Share of the right predictions that is accepted; nan if none is right."""
        return (self.accepted - self.errors) / self.right if self.right else math.nan

    def __str__(self) -> str:
        sure = f"with probability {1 - self.delta:g}"
        tuned = f", {self.tuned_on:,} others tuned the score" if self.tuned_on else ""
        lines = [
            f"{self.criterion} {self.value:g}: accept a confidence of {self.threshold:.6g} or more",
            f"{self.samples:,} held-out samples{tuned}",
            f"coverage {self.coverage:.4f} (at least {self.coverage_bound:.4f} {sure})",
            f"risk {self.risk:.4f} (at most {self.risk_bound:.4f} {sure})",
            f"{self.tpr:.4f} of the right predictions accepted",
        ]
        if (c := self.cascade) is not None:
            lines.append(
                f"cascade: {c.forward_rows:.2f} rows forward and {c.backward_rows:.2f} backward a "
                f"sample instead of {c.expensive_forward_rows:.2f} and "
                f"{c.expensive_backward_rows:.2f}; {100 * c.changed:.2f} % of the decisions changed"
            )
        return "\n".join(lines)


class Detector:
    """Accepts the predictions whose confidence reaches a threshold, and rejects the others.

    Made by `Detector.fit` or `Detector.load`. ``detector(x)`` costs what the score costs: a forward
    pass for a score of the logits. The prediction comes with it.

    Attributes:
        model: the classifier.
        score: the `rat_ext.scores.Score` in use, fitted.
        report: a `DetectorReport`: the threshold, and what it does on the held-out data.
    """

    def __init__(
        self,
        model: Model,
        score: Score,
        report: DetectorReport,
        steps: tuple[Tensor, Tensor] | None = None,
        *,
        model_fingerprint: str | None = None,
    ) -> None:
        self.model, self.score, self.report = model, score, report
        self._steps = steps  # where the probability rises, ascending, and the probabilities there
        self._fingerprint = model_fingerprint

    @property
    def threshold(self) -> float:
        """The least confidence that is accepted."""
        return self.report.threshold

    @property
    def calibrated(self) -> bool:
        """Decisions come with probabilities."""
        return self._steps is not None

    def __repr__(self) -> str:
        return f"Detector({type(self.score).__name__}, {self.report})"

    @classmethod
    def fit(
        cls,
        model: Model,
        loader: Iterable[Any],
        score: str | Score = "rr-bs",
        *,
        target_risk: float | None = None,
        coverage: float | None = None,
        tpr: float | None = None,
        delta: float = 0.001,
        tune_share: float = 0.2,
        calibrate: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> Detector:
        """Choose the threshold of a score on held-out data.

        Exactly one of ``target_risk``, ``coverage`` and ``tpr`` says what the threshold is to do.

        With ``target_risk`` as many samples are accepted as can be while, with probability
        ``1 - delta`` over the held-out data, at most this share of the accepted predictions on new
        data is wrong. The bound is SGR's (Geifman and El-Yaniv, NeurIPS 2017): Clopper-Pearson at
        ``delta / ceil(log2 m)`` for m samples. It is evaluated from as many starting thresholds,
        spread evenly over the counts of samples that could do, and from each on to laxer ones until
        the first that fails (fixed-sequence testing: Angelopoulos et al., "Learn then Test", 2021).
        SGR's binary search has the same bound, but takes a threshold that fails for want of samples
        for one that is too lax. The guarantee supposes that new samples are exchangeable with the
        held-out ones, and that a laxer threshold has no smaller risk.

        If the score has something to fit (a temperature, a matrix, the band of a cascade), that is
        done on a random ``tune_share`` of the held-out samples, and the threshold is chosen on the
        others: chosen on the same ones, the guarantee would be void. If it has not, or is fitted
        already (on other data!), all of them choose the threshold.

        Args:
            model: callable from (N, ...) inputs to (N, C) logits, C >= 2, or to an object with
                ``.logits``.
            loader: yields (x, target, ...) that the model was not trained on; the same in every
                pass, unless the score needs no fit. A target of -1 is never predicted right.
            score: a name in `rat_ext.scores.names()`, a score, or a `Cascade`. It is copied.
            target_risk: error rate of the accepted predictions, in (0, 1).
            coverage: share of the samples to accept at least, in (0, 1].
            tpr: share of the right predictions to accept at least, in (0, 1], as in FPR@95TPR.
            delta: probability, in (0, 1), that a bound may fail.
            tune_share: in (0, 1).
            calibrate: map confidences to the probability of being right, by isotonic regression on
                the samples that choose the threshold.
            seed: of the random split.
            progress: show tqdm bars on standard error.

        Raises:
            ValueError: no threshold guarantees the target risk on these samples; an option out of
                its range; a loader whose passes differ, or that gives no usable samples.
            ImportError: scipy or scikit-learn is not installed.
        """
        rule = Rule.checked(target_risk, coverage, tpr, delta)
        if not 0 < tune_share < 1:
            raise ValueError(f"tune_share is {tune_share}; it must be between 0 and 1")
        _require_libraries(calibrate)
        score = own(score)
        held_out, tuned_on = loader, 0
        if score.needs_fit:
            split = Split(loader, tune_share, seed)
            held_out = split.rest
            score.fit(model, split.tune, progress=progress)
            if isinstance(score, Cascade):
                ratio = (1 - tune_share) / tune_share
                score.fit_band(
                    model,
                    split.tune,
                    lambda confidence, right: rule.anticipate(confidence, right, ratio),
                    progress=progress,
                )
            tuned_on = split.tune.samples
        alone = own(score.expensive) if isinstance(score, Cascade) else None
        batches, alone_batches = [], []
        for x, target in labelled_batches(model, held_out, progress, "fit Detector"):
            values, prediction = score.score_and_predict(model, x)
            batches.append((values.cpu(), (prediction == target).cpu()))
            if alone is not None:
                alone_batches.append(alone.score(model, x).cpu())
        confidences, rights = zip(*batches, strict=True)
        confidence = torch.cat(confidences).double().numpy()
        right = torch.cat(rights).numpy() & ~np.isnan(confidence)
        threshold = rule.choose(confidence, right)
        cascade = None
        if alone is not None:
            changed = (confidence >= threshold.value) != (
                torch.cat(alone_batches).double().numpy() >= threshold.value
            )
            cascade = CascadeReport(
                examined=score.examined,
                changed=float(changed.mean()),
                forward_rows=score.forward_rows,
                backward_rows=score.backward_rows,
                expensive_forward_rows=alone.forward_rows,
                expensive_backward_rows=alone.backward_rows,
            )
        samples = len(confidence)
        report = DetectorReport(
            criterion=rule.criterion,
            value=rule.value,
            delta=rule.delta,
            threshold=threshold.value,
            samples=samples,
            tuned_on=tuned_on,
            right=int(right.sum()),
            accepted=threshold.accepted,
            errors=threshold.errors,
            coverage_bound=1 - float(upper_bound(samples - threshold.accepted, samples, delta)),
            risk_bound=threshold.risk_bound,
            cascade=cascade,
        )
        steps = _isotonic(confidence, right) if calibrate else None
        known = fingerprint(model) if isinstance(model, nn.Module) else None
        return cls(model, score, report, steps, model_fingerprint=known)

    def __call__(self, x: Tensor) -> Decision:
        """Predict, and decide which predictions to accept.

        The model is run in eval mode and left as it was, with no graph.

        Args:
            x: (N, ...) inputs on the model's device.

        Raises:
            ValueError: x is not on the model's device, or outside the bounds of the score.
        """
        confidence, prediction = self.score.score_and_predict(self.model, x)
        unknown = confidence.isnan()
        probability = None
        if self._steps is not None:
            starts, values = (step.to(confidence) for step in self._steps)
            step = torch.searchsorted(starts, confidence.contiguous(), right=True) - 1
            # Below the least confidence seen, the first probability holds.
            probability = values[step.clamp_min(0)].masked_fill(unknown, math.nan)
        return Decision(
            prediction=prediction.masked_fill(unknown, -1),
            confidence=confidence,
            accepted=confidence >= self.threshold,  # False for nan
            probability=probability,
        )

    def save(self, path: str | Path) -> None:
        """Write the detector, without the model, to one .safetensors file.

        The tensors are those of the score and of the calibration; all else is JSON in the header.

        Raises:
            ValueError: the score cannot be saved; says why.
            ImportError: safetensors is not installed.
        """
        save_file = require_safetensors().torch.save_file
        from .training import replace

        tensors: dict[str, Tensor] = {}
        header = {
            "version": _VERSION,
            "fingerprint": self._fingerprint,
            "score": _packed(self.score, "score", tensors),
            # As text: it may be infinite, for which JSON has no number.
            "report": {**asdict(self.report), "threshold": str(self.threshold)},
        }
        if self._steps is not None:
            tensors["probability.starts"], tensors["probability.values"] = self._steps
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {_KEY: json.dumps(header, allow_nan=False)}
        replace(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path, model: Model, *, strict: bool = True) -> Detector:
        """Read a detector that `save` wrote.

        Args:
            path: of the file.
            model: the classifier that the detector was fitted on.
            strict: check by a hash of its state dict that it is the same. The threshold means
                nothing for another model; not checking is for a model of the same weights whose
                state dict differs, for example in its names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a detector, is of another model, or has a score that is not
                registered.
            ImportError: safetensors is not installed.
        """
        safetensors = require_safetensors()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no detector {path}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if _KEY not in metadata:
            raise ValueError(f"{path} is not a detector; Detector.save writes them")
        header = json.loads(metadata[_KEY])
        if header["version"] != _VERSION:
            raise ValueError(
                f"{path} has version {header['version']} of the format, this rat_ext reads "
                f"{_VERSION}; fit the detector again"
            )
        known = header["fingerprint"]
        if strict:
            _check_fingerprint(path, known, model)
        report = header["report"]
        report["threshold"] = float(report["threshold"])
        if report["cascade"] is not None:
            report["cascade"] = CascadeReport(**report["cascade"])
        steps = None
        if "probability.starts" in tensors:
            steps = tensors["probability.starts"], tensors["probability.values"]
        score = _unpacked(header["score"], "score", tensors)
        return cls(model, score, DetectorReport(**report), steps, model_fingerprint=known)


def _isotonic(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """The isotonic regression of being right on the confidence, as the starts of its steps.

    A step function needs no arithmetic on confidences, which may be infinite.
    """
    from sklearn.isotonic import IsotonicRegression

    known = ~np.isnan(confidence)
    values, rank = np.unique(confidence[known], return_inverse=True)
    fitted = IsotonicRegression().fit(rank, correct[known]).predict(np.arange(len(values)))
    first = np.concatenate([[True], np.diff(fitted) > 0])
    return torch.from_numpy(values[first]), torch.from_numpy(fitted[first])


# --- Saving ---------------------------------------------------------------------------------------


def _packed(score: Score, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The score as values for JSON; its tensors are put under the prefix."""
    if isinstance(score, Cascade):
        parts = {
            name: _packed(getattr(score, name), f"{prefix}.{name}", tensors)
            for name in ("cheap", "expensive")
        }
        return {**parts, "band": list(map(str, score.band)), "max_changed": score.max_changed}
    kind, name = type(score), scores.name_of(score)
    if name is None:
        raise ValueError(
            f"a {kind.__name__} cannot be saved: its class is not registered; put "
            "@rat_ext.scores.register(name) above it"
        )
    try:
        for method in ("__init__", "fit"):
            if not issubclass(_definer(kind, "state"), _definer(kind, method)):
                raise TypeError(f"{kind.__name__} defines {method}(), but not state() with it")
        state = score.state()
        values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        json.dumps(values, allow_nan=False)
        kind.from_state(state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the score {name!r} cannot be saved: {error}. Let {kind.__name__}.state() return "
            "tensors, and values that JSON has, from which from_state() makes the fitted score"
        ) from error
    tensors.update({f"{prefix}.{key}": state[key] for key in state.keys() - values.keys()})
    return {"name": name, "state": values}


def _unpacked(packed: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Score:
    if "band" in packed:
        parts = {
            name: _unpacked(packed[name], f"{prefix}.{name}", tensors)
            for name in ("cheap", "expensive")
        }
        cascade = Cascade(**parts, max_changed=packed["max_changed"])
        low, high = map(float, packed["band"])
        cascade.band = low, high
        return cascade
    name = packed["name"]
    if name not in scores.names():
        raise ValueError(
            f"no score is named {name!r}; import the module that registers it before loading"
        )
    held = {
        key.removeprefix(f"{prefix}."): value
        for key, value in tensors.items()
        if key.startswith(f"{prefix}.")
    }
    return scores._registry[name].from_state({**packed["state"], **held})


def _definer(kind: type, method: str) -> type:
    """The class that a method of `kind` comes from."""
    return next(cls for cls in kind.__mro__ if method in vars(cls))


def _check_fingerprint(path: Path, known: str | None, model: Model) -> None:
    escape = "pass strict=False if you know that it is the same"
    if known is None or not isinstance(model, nn.Module):
        raise ValueError(
            f"{path} cannot be checked against this model: a callable that is no nn.Module has no "
            f"state dict; {escape}"
        )
    if fingerprint(model) != known:
        raise ValueError(
            f"{path} was fitted on a model with other weights than this {type(model).__name__}, "
            f"for which its threshold means nothing: load the weights that it was fitted on, or "
            f"fit a detector on these; {escape}"
        )


def _require_libraries(calibrate: bool) -> None:
    try:
        import scipy.special  # noqa: F401

        if calibrate:
            import sklearn.isotonic  # noqa: F401
    except ImportError as error:
        raise ImportError(f"fitting a detector needs scipy and scikit-learn: {_EXTRA}") from error


def require_safetensors() -> Any:
    """The module that detectors are saved with."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"saving and loading a detector needs safetensors: {_EXTRA}") from error
    return safetensors
