"""Predictions over HTTP, each with its radius and the detector's verdict: ``rat-ext serve``.

Data flows one way: `body` takes what a client sent, `decoding` makes a tensor of it, `batching`
gathers tensors into batches, and `gate` runs the model on them in one thread. `judging` leads an
input through these, `routes` are the paths that it comes by, with the types of `schema`. `app` is
all of it as an application, with the numbers of `monitoring`; `server` listens for it.
Here is only what needs none of the packages that they do, for the command line.
"""

from .settings import Settings

__all__ = ["Settings"]
