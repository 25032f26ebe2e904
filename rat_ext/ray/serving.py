"""The service of ``rat-ext serve`` as a deployment of Ray Serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import models
from .._common.extras import install
from ..datasets import Preprocessing
from ..search.options import SearchOptions
from ..serve import Settings

if TYPE_CHECKING:
    from ray.serve import Deployment
    from typing_extensions import Unpack


def deployment(
    checkpoint: str | Path,
    *,
    detector: str | Path | None = None,
    model: str | None = None,
    classes: Sequence[str] | None = None,
    input_size: Sequence[int] | None = None,
    preprocessing: Preprocessing | None = None,
    resize: bool = False,
    radius: bool = True,
    settings: Settings | None = None,
    **options: Unpack[SearchOptions],
) -> Deployment:
    """A deployment whose replicas answer as ``rat-ext serve`` does: same requests, same answers.

        app = rat_ext.ray.deployment("/shared/model.pt", detector="/shared/detector.safetensors")
        two = app.options(num_replicas=2, ray_actor_options={"num_gpus": 1})
        serve.run(two.bind(), route_prefix="/rat")

    It has the paths /predict, /predict-batch, /info and the page at /. Replicas, health, metrics
    and restarts are Serve's; ``Deployment.options`` sets them. Each replica loads the model, on a
    GPU if it has been given one, and gathers the inputs that come to it in batches of its own, by
    `ray.serve.batch`.

    Args:
        checkpoint: weights of the model. All machines must be able to read it.
        detector: file of the detector that gives verdicts; likewise.
        model: name of the model, for `rat_ext.models.create`; default that of the checkpoint.
        classes: names of the classes; default those of the checkpoint.
        input_size: shape of an input; default as the checkpoint says, else the model.
        preprocessing: what images of another size go through; default likewise.
        resize: resize images of another size, instead of refusing them.
        radius: measure radii; without them, a detector is needed.
        settings: limits. ``max_batch``, ``max_wait_ms``, ``queue``, ``timeout``, ``body_timeout``,
            ``max_body`` and ``max_pixels`` hold for each replica; connections are Serve's.
        options: of `rat_ext.robust_radius`.

    Raises:
        ValueError, TypeError: the checkpoint does not name its model or classes, and they are not
            given; or options are out of their range.
        FileNotFoundError: there is no such file.
        ImportError: the extra `ray` is not installed.
    """
    try:
        from ray import serve

        from ..serve.loading import check_search
        from . import replica
    except ModuleNotFoundError as error:
        raise ImportError(f"serving on Ray needs {error.name}: {install('ray')}") from error
    name = model or models.name_in(checkpoint)
    if name is None:
        raise ValueError("the checkpoint does not name its model: give model=")
    classes = classes or models.classes_in(checkpoint)
    if not classes:
        raise ValueError("the checkpoint does not name its classes: give classes=")
    known = preprocessing or models.preprocessing_in(checkpoint) or models.preprocessing(name)
    shape = tuple(input_size or (known.size if known else ()))
    if not shape:
        raise ValueError(f"give the input_size of {name}, for example (3, 224, 224)")
    if known and known.size != shape:
        known = replace(known, size=shape) if len(shape) == 3 else None
    if detector is not None and not Path(detector).is_file():
        raise FileNotFoundError(f"there is no detector {detector}")
    check_search(shape, torch.float64, options)
    settings = settings or Settings()
    what = replica.Served(
        checkpoint=Path(checkpoint),
        name=name,
        classes=tuple(classes),
        shape=shape,
        preprocessing=known,
        detector=None if detector is None else Path(detector),
        radius=radius,
        resize=resize,
        options=options,
    )

    def application() -> Any:  # built in each replica
        return replica.application(what, settings)

    # A batch can fill while another one runs. What waits beyond that is refused by Serve.
    made: Deployment = serve.deployment(
        name="rat_ext",
        max_ongoing_requests=2 * settings.max_batch,
        max_queued_requests=settings.queue,
    )(serve.ingress(application)())
    return made
