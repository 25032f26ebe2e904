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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._common.loaders import labelled_batches
from .._common.storage import fingerprint, write_whole
from .._common.user_model import Model
from ..scores.base import Score
from ..scores.cascade import Cascade, own
from .file import (
    _EXTRA,
    _KEY,
    _VERSION,
    _check_fingerprint,
    _packed,
    _unpacked,
    require_safetensors,
)
from .fit_report import CascadeReport, Decision, DetectorReport
from .held_out import Split
from .threshold import Rule, upper_bound


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
        write_whole(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

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


def _require_libraries(calibrate: bool) -> None:
    try:
        import scipy.special  # noqa: F401

        if calibrate:
            import sklearn.isotonic  # noqa: F401
    except ImportError as error:
        raise ImportError(f"fitting a detector needs scipy and scikit-learn: {_EXTRA}") from error
