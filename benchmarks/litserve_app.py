"""The service of `rat-ext serve` on LitServe, for serve_litserve.py: the same decoding and gate."""

import argparse
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import torch
from fastapi import UploadFile
from torch import Tensor

from rat_ext import models
from rat_ext.serve.gate import Answer
from rat_ext.serve.loading import make_gate
from rat_ext.serve.schema import Prediction

CLASSES = list("0123456789")


class API(litserve.LitAPI):
    """Counts its batches, and the inputs in them, in the file "counts" beside the checkpoint."""

    def __init__(self, folder: Path, shape: tuple[int, ...], **limits: Any) -> None:
        super().__init__(**limits)
        self.folder, self.shape = folder, shape

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        checkpoint = self.folder / "model.pt"
        model = models.create(models.name_in(checkpoint), len(CLASSES)).eval()
        models.load_weights(model, checkpoint)
        self.gate, self.decoder = make_gate(
            model,
            self.shape,
            detector=None,
            radius=True,
            device=torch.device(device),
            resize=False,
            max_pixels=2**24,
            preprocessing=None,
            options={},
        )
        self.counts = np.memmap(self.folder / "counts", np.int64, "r+", shape=2)

    def decode_request(self, request: UploadFile) -> Tensor:
        return self.decoder(request.file.read())

    def batch(self, inputs: list[Tensor]) -> list[Tensor]:
        return inputs

    def predict(self, inputs: list[Tensor]) -> list[Answer]:
        self.counts += (1, len(inputs))
        return self.gate(inputs)

    def unbatch(self, output: list[Answer]) -> list[Answer]:
        return output

    def encode_response(self, output: Answer) -> dict[str, Any]:
        return Prediction.of(output, CLASSES).model_dump()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", type=int, nargs="+")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--max-wait-ms", type=float)
    parser.add_argument("--fast-queue", action="store_true")
    options = parser.parse_args()
    api = API(
        options.folder,
        tuple(options.shape),
        max_batch_size=options.max_batch,
        batch_timeout=options.max_wait_ms / 1000,
    )
    litserve.LitServer(api, accelerator="cpu", fast_queue=options.fast_queue).run(
        host="127.0.0.1",
        port=options.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
