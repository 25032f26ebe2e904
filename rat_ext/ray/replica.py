"""What runs in a replica of Ray Serve: the service's routes around a gate of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import FastAPI
from ray import serve
from torch import Tensor

from .. import models
from ..datasets import Preprocessing
from ..search.options import SearchOptions
from ..serve import Settings
from ..serve.app import new_app
from ..serve.batching import run_apart
from ..serve.gate import Answer
from ..serve.judging import Judge
from ..serve.loading import make_gate
from ..serve.routes import routes
from ..serve.schema import Info


@dataclass(frozen=True)
class Served:
    """A trained classifier, and how it is to be served."""

    checkpoint: Path
    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    preprocessing: Preprocessing | None
    detector: Path | None
    radius: bool
    resize: bool
    options: SearchOptions


def application(what: Served, settings: Settings) -> FastAPI:
    """The ASGI application of one replica; its model has been loaded, and run once."""
    model = models.create(what.name, len(what.classes))
    models.load_weights(model, what.checkpoint)
    gate, decoder = make_gate(
        model.eval(),
        what.shape,
        detector=what.detector,
        radius=what.radius,
        # Ray shows a replica the GPUs that it has been given, and no others.
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        resize=what.resize,
        max_pixels=settings.max_pixels,
        preprocessing=what.preprocessing,
        options=what.options,
    )

    @serve.batch(
        max_batch_size=settings.max_batch, batch_wait_timeout_s=settings.max_wait_ms / 1000
    )
    async def judged(inputs: list[Tensor]) -> list[Answer | Exception]:
        return await asyncio.to_thread(run_apart, gate, inputs)

    async def submit(x: Tensor) -> Answer:
        answer: Answer | Exception = await judged(x)
        if isinstance(answer, Exception):
            raise answer
        return answer

    app = new_app()
    info = Info.of(gate, decoder, settings, what.name, what.classes)
    judge = Judge(submit, decoder, settings)
    # How much may wait is Serve's affair, and so are the metrics.
    app.include_router(
        routes(judge, settings, info, check=lambda: None, observe=lambda answer: None)
    )
    return app
