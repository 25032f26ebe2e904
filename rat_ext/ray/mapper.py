"""Radii of the batches of a Ray Dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._common.user_model import Model
from ..radius import RadiusEstimator
from ..radius.estimator import estimator_options
from ..search.options import SearchOptions, shows_options

if TYPE_CHECKING:
    from ray.data import Dataset
    from typing_extensions import Unpack

COLUMNS = ("radius", "lower", "upper", "found", "prediction", "flipped_to", "forward_rows")
"""What is added to a batch: fields of a `RadiusResult`."""


def as_tensor(column: NDArray[Any]) -> Tensor:
    """The inputs in a column, in memory of their own: what Ray hands out may not be written to."""
    if column.dtype == object:
        raise ValueError(
            "the inputs are not all of one shape, or are no numbers; make them so before, or give "
            "prepare=, a function from the column to a tensor"
        )
    return torch.tensor(column)


@shows_options(without=["attack", "batch_size", "norm", "steps"])
class RadiusMapper:
    """Adds radii to the batches of a `ray.data.Dataset`: one model in each actor.

        def make_model():
            model = rat_ext.models.create("resnet20")
            rat_ext.models.load_weights(model, "/shared/model.pt")
            return model.cuda()

        mapper = rat_ext.ray.RadiusMapper(make_model, x="image", rtol=1e-2)
        images = ray.data.read_parquet("/shared/images")
        eight = ray.data.ActorPoolStrategy(size=8)
        radii = mapper.over(images, batch_size=256, compute=eight, num_gpus=1)
        radii.write_parquet("/shared/radii")

    A batch keeps its columns, and gets ``radius``, ``lower``, ``upper``, ``found``, ``prediction``,
    ``flipped_to`` and ``forward_rows``: the fields of a `RadiusResult`, equal to those of
    ``robust_radius(model, x, full=True)``. The model is made, and its `RadiusEstimator` with it,
    when the first batch comes; both stay as long as the actor does. What an actor or machine that
    dies had in work, Ray gives to another one, so that no row is lost or comes twice.

    Args:
        make_model: called once in each actor, returns the model on the device that it is to run on.
        x: name of the column of inputs.
        prepare: makes the (N, ...) tensor of inputs from the column, a NumPy array, for example of
            images in bytes: ``lambda a: torch.tensor(a).permute(0, 3, 1, 2) / 255``. By default the
            column is taken as it is.
        {options}

    Raises:
        ValueError, TypeError: as `RadiusEstimator`; options that are wrong for any input already
            when the mapper is made.
    """

    def __init__(
        self,
        make_model: Callable[[], Model],
        x: str = "x",
        *,
        prepare: Callable[[NDArray[Any]], Tensor] = as_tensor,
        **options: Unpack[SearchOptions],
    ) -> None:
        # The inputs come later: of the widest dtype, and of a shape that fits what is given.
        ends = [end for end in options.get("bounds") or () if isinstance(end, Tensor)]
        row = torch.broadcast_shapes((1,), *(end.shape for end in ends))
        estimator_options(torch.empty(1, *row, dtype=torch.float64), **options)
        self._make_model, self._x, self._prepare, self._options = make_model, x, prepare, options
        self._model: Model | None = None
        self._estimator: RadiusEstimator | None = None
        self._shape: tuple[int, ...] = ()

    def over(self, dataset: Dataset, **map_batches: Any) -> Dataset:
        """The dataset with radii, which Ray computes once it is used.

        Args:
            dataset: has the column of inputs, and none of those that are added.
            map_batches: arguments of `ray.data.Dataset.map_batches`, such as ``batch_size``,
                ``compute`` (how many actors; by default as many as there is room for) and
                ``num_gpus`` (of each).

        Raises:
            ValueError: the dataset is known to have other columns than these.
        """
        if (columns := dataset.columns(fetch_if_missing=False)) is not None:
            self._check_columns(columns)
        return dataset.map_batches(
            type(self),
            fn_constructor_args=(self._make_model, self._x),
            fn_constructor_kwargs={"prepare": self._prepare, **self._options},
            batch_format="numpy",
            **map_batches,
        )

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with its radii.

        Args:
            batch: arrays by the name of their column, of a row for each sample.

        Raises:
            ValueError, TypeError: a column is missing or there already, or the inputs are none that
                `robust_radius` takes.
        """
        self._check_columns(batch)
        x = self._prepare(batch[self._x])
        if self._model is None:
            self._model = self._make_model()
        if isinstance(self._model, nn.Module):
            x = x.to(next((p.device for p in self._model.parameters()), x.device))
        result = self._estimator_for(x)(x)
        added = {name: getattr(result, name).cpu().numpy() for name in COLUMNS}
        return {**batch, **added}

    def _check_columns(self, columns: Any) -> None:
        if self._x not in columns:
            raise ValueError(
                f"there is no column {self._x!r} of inputs; there are {', '.join(columns)}. Name "
                "it with x="
            )
        if taken := [name for name in COLUMNS if name in columns]:
            raise ValueError(
                f"the dataset has a column {taken[0]!r} already, which is to be added; rename it "
                "first with Dataset.rename_columns"
            )

    def _estimator_for(self, x: Tensor) -> RadiusEstimator:
        """The estimator that there is, or a new one where a larger batch comes.

        Batches are of one size but the last of a block, which may well come first.
        """
        assert self._model is not None
        if self._estimator is None or len(x) > self._shape[0] or x.shape[1:] != self._shape[1:]:
            self._estimator = RadiusEstimator(self._model, x, **self._options)
            self._shape = tuple(x.shape)
        return self._estimator
