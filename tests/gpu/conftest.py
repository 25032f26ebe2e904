"""For all tests on a GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
