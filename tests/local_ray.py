"""Ray on this machine, with two workers."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator

import helpers
import pytest


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Start it, and end it; skips where it is not installed. Workers get `helpers` by value."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.cloudpickle.register_pickle_by_value(helpers)  # they cannot import it
    with (
        pytest.MonkeyPatch.context() as patch,
        # Workers run, and look for modules, where Ray was started: in the source tree they would
        # find a package without its core. The folder lives as long as they do.
        tempfile.TemporaryDirectory() as elsewhere,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token to the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with pytest.MonkeyPatch.context() as place:
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
