"""Ray on this machine, with two workers."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator

import helpers
import pytest


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Start it, and end it; skips where it is not installed. Workers get `helpers` by value."""
    if os.environ.get("RAT_EXT_TEST_RAY") != "1":
        # In a clone whose package is installed elsewhere, workers have been seen not to start.
        pytest.skip("Ray's workers do not start everywhere; RAT_EXT_TEST_RAY=1 runs this")
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.cloudpickle.register_pickle_by_value(helpers)  # they cannot import it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token to the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with tempfile.TemporaryDirectory() as elsewhere, pytest.MonkeyPatch.context() as place:
            # Workers look for modules where this was called: in a clone whose package is installed
            # elsewhere they would find one without its core.
            place.chdir(elsewhere)
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=80 * 2**20,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        try:
            yield
        finally:
            ray.shutdown()
            ray.cloudpickle.unregister_pickle_by_value(helpers)
