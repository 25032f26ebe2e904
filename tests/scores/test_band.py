"""The band of a cascade by brute force."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rat_ext.scores.band import narrowest_band


@settings(deadline=None)
@given(
    samples=st.lists(
        st.tuples(
            st.sampled_from([-1.0, 0.0, 1.0, 2.0, 3.0, math.inf]), st.booleans(), st.booleans()
        ),
        min_size=1,
        max_size=10,
    ),
    budget=st.integers(0, 3),
)
def test_the_band_is_the_narrowest(samples: list[tuple[float, bool, bool]], budget: int) -> None:
    cheap, rejected, accepted = map(np.array, zip(*samples, strict=True))
    budget = min(budget, len(cheap) - 1)

    def outcome(low: float, high: float) -> tuple[int, int]:
        above = cheap > high
        below = (cheap < low) & ~above
        changed = (above & rejected).sum() + (below & accepted).sum()
        return int(changed), int((~above & ~below).sum())

    share = (budget + 0.5) / len(cheap)
    band = narrowest_band(cheap, rejected=rejected, accepted=accepted, max_changed=share)
    changed, examined = outcome(*band)
    assert changed <= budget
    if math.inf in cheap:
        return  # no number is above it, so that there is no band below it
    ends = [-math.inf, *np.unique(cheap), math.inf]
    outcomes = [outcome(low, high) for low in ends for high in ends]
    assert examined == min(size for wrong, size in outcomes if wrong <= budget)
