"""Tabular data: how far a patient's features are from the other diagnosis, and a gate.

    python examples/tabular.py

Scikit-learn's breast cancer data: 569 patients, 30 features, malignant or benign. Needs
scikit-learn.
"""

import torch
import tyro
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rat_ext
from rat_ext import scores


def main(epochs: int = 30, coverage: float = 0.9) -> None:
    """Train a small network, look at one prediction, and gate the others.

    Args:
        epochs: how often to go through the training data.
        coverage: share of the predictions to accept.
    """
    torch.manual_seed(0)
    data = load_breast_cancer()
    split = train_test_split(data.data, data.target, test_size=0.6, random_state=0)
    # Scaled, so that a step means about the same in each feature: one standard deviation.
    scaler = StandardScaler().fit(split[0])
    train_x, rest_x = (torch.tensor(scaler.transform(x)).float() for x in split[:2])
    train_t, rest_t = map(torch.tensor, split[2:])

    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for x, t in DataLoader(TensorDataset(train_x, train_t), 32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), t).backward()
            optimizer.step()

    # bounds=None: features have no common range. In the L2 norm a step is mostly in the features
    # that matter; the default L-inf norm moves every feature by the same amount.
    half = len(rest_x) // 2
    new_x, new_t = rest_x[half:], rest_t[half:]
    options = {"bounds": None, "eps_max": 100.0, "attack": "fgsm_l2"}
    result = rat_ext.robust_radius(model, new_x, full="points", **options)
    row = int(result.radius.argmin())
    names = [data.target_names[index] for index in (result.prediction[row], result.flipped_to[row])]
    print(f"The least robust prediction is {names[0]}; the nearest point found that is {names[1]}")
    print(f"is {result.radius[row]:.3f} standard deviations away. What differs most there:")
    change = (result.x_adv[row] - new_x[row]) * torch.tensor(scaler.scale_)
    for feature in (result.x_adv[row] - new_x[row]).abs().argsort(descending=True)[:3].tolist():
        print(f"  {data.feature_names[feature]}: {change[feature]:+.4g}")

    # The score gets the options of robust_radius; with a temperature there is nothing to tune.
    score = scores.get("rr-bs", temperature=1.0, **options)
    held_out = DataLoader(TensorDataset(rest_x[:half], rest_t[:half]), 64)
    gate = rat_ext.Detector.fit(model, held_out, score, coverage=coverage, progress=False)
    out = gate(new_x)
    wrong = out.prediction != new_t
    print(f"All {len(wrong)} new predictions: {int(wrong.sum())} wrong.")
    print(f"The {int(out.accepted.sum())} accepted: {int(wrong[out.accepted].sum())} wrong.")


if __name__ == "__main__":
    tyro.cli(main)
