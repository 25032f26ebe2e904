"""The detector: how it is fitted, and how it decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._common.extras import install
from .._common.loaders import labelled_batches, map_batches
from .._common.per_sample import with_arguments
from .._common.storage import fingerprint
from .._common.user_model import Model
from ..scores.base import Score
from . import file
from .choice import aurc_of_each, candidates, label
from .fit_report import Decision, DetectorReport
from .held_out import Split
from .sorted_part import warn_of_a_part
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
        score: str | Score | Sequence[str | Score] = "rr-bs",
        *,
        target_risk: float | None = None,
        coverage: float | None = None,
        tpr: float | None = None,
        delta: float = 0.001,
        tune_share: float = 0.2,
        calibrate: bool = False,
        seed: int = 0,
        progress: bool = True,
        batch_fn: Callable[[Any], Any] | None = None,
    ) -> Detector:
        """Choose the threshold of a score on held-out data.

        Exactly one of ``target_risk``, ``coverage`` and ``tpr`` says what the threshold is to do.

        With ``target_risk`` as many samples are accepted as can be while, with probability
        ``1 - delta`` over the held-out data, at most this share of the accepted predictions on new
        data is wrong. The bound is SGR's (Geifman and El-Yaniv, NeurIPS 2017): Clopper-Pearson at
        ``delta / ceil(log2 m)`` for m samples, at least. It is evaluated from as many starting
        thresholds, spread evenly over the counts of samples that could do, and from each on to
        laxer ones until the first that fails; where none fails, a start adds its share of delta to
        that of those before it (the fallback procedure: Wiens, "A fixed sequence Bonferroni
        procedure", 2003). SGR's binary search takes a threshold that fails for want of samples for
        one that is too lax. The guarantee supposes that new samples are exchangeable with the
        held-out ones, and that a laxer threshold has no smaller risk.

        If the score has something to fit (a temperature, a matrix, the band of a cascade), that is
        done on a random ``tune_share`` of the held-out samples, and the threshold is chosen on the
        others: chosen on the same ones, the guarantee would be void. If it has not, or is fitted
        already (on other data!), all of them choose the threshold.

        Args:
            model: callable from (N, ...) inputs to (N, C) logits, C >= 2, or to an object with
                ``.logits``.
            loader: yields (x, target, ...), or mappings with "pixel_values" and "labels", that the
                model was not trained on; the same in every pass, unless the score needs no fit. A
                target of -1 is never predicted right.
            score: a score, which is copied, or the name of one: in `rat_ext.scores.names()`, or
                "cascade" for a `Cascade` with its defaults. Of several the one with the smallest
                AURC on the ``tune_share`` is taken; "auto" stands for msr, margin, energy and
                rr-bs.
            target_risk: error rate of the accepted predictions, in (0, 1).
            coverage: share of the samples to accept at least, in (0, 1].
            tpr: share of the right predictions to accept at least, in (0, 1], as in FPR@95TPR.
            delta: probability, in (0, 1), that a bound may fail.
            tune_share: in (0, 1).
            calibrate: map confidences to the probability of being right, by isotonic regression on
                the samples that choose the threshold.
            seed: of the random split.
            batch_fn: for a loader that yields something else: makes (x, target) or (x, target,
                model_kwargs) from a batch.
            progress: show tqdm bars on standard error.

        Warns:
            RuntimeWarning: the samples seem to be a part of data that are sorted by class, and not
                a random sample of them.

        Raises:
            ValueError: no threshold guarantees the target risk on these samples; an option out of
                its range; a loader whose passes differ, or that gives no usable samples.
            ImportError: scipy or scikit-learn is not installed.
        """
        rule = Rule.checked(target_risk, coverage, tpr, delta)
        if not 0 < tune_share < 1:
            raise ValueError(f"tune_share is {tune_share}; it must be between 0 and 1")
        _require_libraries(calibrate)
        if batch_fn is not None:
            loader = map_batches(loader, batch_fn)
        scores = candidates(score)
        chosen, compared = scores[0], None
        held_out, tuned_on = loader, 0
        if len(scores) > 1 or scores[0].needs_fit:
            split = Split(loader, tune_share, seed)
            held_out = split.rest
            ratio = (1 - tune_share) / tune_share

            def anticipated(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
                return rule.anticipate(confidence, right, ratio)

            for each in scores:
                if each.needs_fit:
                    each.fit_to_threshold(model, split.tune, anticipated, progress=progress)
            if len(scores) > 1:
                aurcs = aurc_of_each(model, scores, split.tune, progress)
                chosen = scores[aurcs.index(min(aurcs))].copy()  # counts its rows anew
                compared = list(zip(map(label, scores), aurcs, strict=True))
            tuned_on = split.tune.samples
        audit = chosen.audit()
        batches = []
        for bound, x, target in labelled_batches(model, held_out, progress, "fit Detector"):
            values, prediction = chosen.score_and_predict(bound, x)
            batches.append((values.cpu(), prediction.cpu(), target.cpu()))
            if audit is not None:
                audit.see(bound, x)
        values, prediction, target = map(torch.cat, zip(*batches, strict=True))
        confidence = values.double().numpy()
        known = ~np.isnan(confidence)
        right = (prediction == target).numpy() & known
        warn_of_a_part(target.numpy(), prediction.numpy()[known])
        threshold = rule.choose(confidence, right)
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
            cascade=None if audit is None else audit.report(confidence, threshold.value),
            compared=compared,
        )
        steps = _isotonic(confidence, right) if calibrate else None
        weights = fingerprint(model) if isinstance(model, nn.Module) else None
        return cls(model, chosen, report, steps, model_fingerprint=weights)

    def __call__(self, x: Tensor, *, model_kwargs: Mapping[str, Any] | None = None) -> Decision:
        """Predict, and decide which predictions to accept.

        The model is run in eval mode and left as it was, with no graph.

        Args:
            x: (N, ...) inputs on the model's device.
            model_kwargs: more arguments of the model, as for `rat_ext.robust_radius`.

        Raises:
            ValueError: x is not on the model's device, or outside the bounds of the score.
        """
        model = with_arguments(self.model, x, model_kwargs)
        confidence, prediction = self.score.score_and_predict(model, x)
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
            OSError: the file cannot be written, for want of space for example.
            ImportError: safetensors is not installed.
        """
        file.write(Path(path), file.Saved(self.score, self.report, self._steps, self._fingerprint))

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
            ValueError: it is not a detector, is damaged or of another model, or has a score that
                is not registered.
            ImportError: safetensors is not installed.
        """
        saved = file.read(Path(path))
        if strict:
            file.check_fingerprint(Path(path), saved.fingerprint, model)
        return cls(
            model, saved.score, saved.report, saved.steps, model_fingerprint=saved.fingerprint
        )


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
        raise ImportError(
            f"fitting a detector needs scipy and scikit-learn: {install('detector')}"
        ) from error
