"""Rel-U: its matrix by loops, and what it cannot learn from."""

import math

import pytest
import torch
from score_helpers import CLASSES, Counting, held_out, softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rat_ext import metrics, scores


def relu_matrix(logits, correct, temperature, weight):
    """D by loops over pairs of classes."""
    p = softmax(logits, temperature)
    matrix = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.float64)
    for i in range(logits.shape[1]):
        for j in range(logits.shape[1]):
            if i != j:
                wrong = (p[~correct, i] * p[~correct, j]).mean()
                right = (p[correct, i] * p[correct, j]).mean()
                matrix[i, j] = max(0.0, weight * wrong - (1 - weight) * right)
    return matrix / matrix.norm()


def logits_loader(logits, target, batch_size=16):
    """Logits as inputs, of the model ``lambda x: x``."""
    return DataLoader(TensorDataset(logits, target), batch_size=batch_size)


def confused(n=200):
    """As confident when wrong, between 0 and 1, as when right, where 2 is likelier than 1."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(n, generator=generator) < 0.3
    logits = torch.randn(n, CLASSES, generator=generator, dtype=torch.float64) * 0.1
    logits[:, 0] = 3
    logits[:, 1] = torch.where(wrong, 2.0, 0.0)
    logits[:, 2] = torch.where(wrong, 0.0, 2.0)
    return logits, wrong.long()


def test_relu_learns_which_classes_are_confused():
    logits, target = confused()
    correct = target == 0
    score = scores.get("rel-u", temperature=2.0, weight=0.4)
    score.fit(nn.Identity(), logits_loader(logits, target), progress=False)
    matrix = relu_matrix(logits, correct, 2.0, 0.4)
    torch.testing.assert_close(score.matrix, matrix)
    confidence = score.score(nn.Identity(), logits)
    p = softmax(logits, 2.0)
    torch.testing.assert_close(confidence, torch.stack([-row @ matrix @ row for row in p]))
    assert metrics.auroc(confidence, correct) > 0.99
    assert metrics.auroc(scores.MSR().score_logits(logits), correct) < 0.7


def test_relu_chooses_its_temperature_on_samples_it_did_not_learn_from():
    x, target = held_out(120).dataset.tensors
    logits = Counting().eval()(x).detach()
    correct = logits.argmax(1) == target
    grid = [0.5, 1.0, 5.0]
    score = scores.get("rel-u", temperature=grid)
    score.fit(nn.Identity(), logits_loader(logits, target), progress=False)
    aurcs = {}
    for temperature in grid:
        matrix = relu_matrix(logits[::2], correct[::2], temperature, 0.5)
        p = softmax(logits[1::2], temperature)
        aurcs[temperature, 0.0] = metrics.aurc(-((p @ matrix) * p).sum(1), correct[1::2])
    assert len(set(aurcs.values())) > 1
    assert score.validation_aurc == pytest.approx(aurcs)
    assert score.setting == min(aurcs, key=aurcs.get)
    torch.testing.assert_close(score.matrix, relu_matrix(logits, correct, score.temperature, 0.5))


def test_relu_without_a_pattern_is_the_gini_index():
    logits, target = confused()
    score = scores.get("rel-u", temperature=1.0, weight=0.0)
    confidence = score.fit(nn.Identity(), logits_loader(logits, target), progress=False).score(
        nn.Identity(), logits
    )
    gini = 1 - softmax(logits).square().sum(1)
    torch.testing.assert_close(confidence, -gini / math.sqrt(CLASSES * (CLASSES - 1)))


def test_relu_needs_right_and_wrong_predictions():
    logits, _ = confused()
    for target, word in ((logits.argmax(1), "right"), (logits.argmin(1), "wrong")):
        with pytest.raises(ValueError, match=f"all 200 held out to learn from are {word}"):
            scores.get("rel-u", temperature=1.0).fit(
                nn.Identity(), logits_loader(logits, target), progress=False
            )
