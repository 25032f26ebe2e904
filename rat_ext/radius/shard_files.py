"""The file of a shard: columns of numbers, whose they are, and a checksum of it all.

A file says of itself which shard of which run it is. So processes that write different shards need
not tell each other, and a kill between two files cannot leave a record that does not fit them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._common.storage import write_whole

Columns = dict[str, np.ndarray]
_MARK = "_shard"


class Mark(NamedTuple):
    """What a file is."""

    run: str
    number: int
    batches: int
    """How many batches of the loader are in it."""

    def with_checksum(self, columns: Columns) -> str:
        """As it is kept in the file."""
        digest = hashlib.sha256(repr(tuple(self)).encode())
        for name, values in sorted(columns.items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).view(np.uint8).data)
        return json.dumps({**self._asdict(), "sha256": digest.hexdigest()})


def file_name(number: int, format: str) -> str:
    """Of a shard."""
    return f"radii-{number:06d}.{format}"


def numbers_in(folder: Path, format: str) -> list[int]:
    """Of the shards in a folder, in order. Files with any other name are somebody else's."""
    found = ((re.search("[0-9]+", path.name), path.name) for path in folder.glob("radii-*"))
    numbers = ((int(digits[0]), name) for digits, name in found if digits)
    return sorted(number for number, name in numbers if name == file_name(number, format))


def write_shard(path: Path, columns: Columns, mark: Mark) -> None:
    """Write a file; its format is its extension."""
    write = FORMATS[path.suffix[1:]][1]
    write_whole(path, partial(write, columns, mark.with_checksum(columns)))


def read_shard(path: Path, run: str, number: int) -> tuple[Columns, int]:
    """The columns of a shard of a run, and how many batches of the loader they are.

    Raises:
        ValueError: there is no file, it is damaged, or it is of another run.
    """
    try:
        columns, text = FORMATS[path.suffix[1:]][0](path)
        found = json.loads(text)
        mark = Mark(*(found[name] for name in Mark._fields))
        if text != mark.with_checksum(columns):
            raise ValueError("its checksum differs")
    except ImportError:  # there is no pyarrow
        raise
    except FileNotFoundError as error:
        raise _bad(path, "missing") from error
    except Exception as error:  # zipfile, numpy and pyarrow raise many kinds
        raise _bad(path, f"damaged ({error})") from error
    if (mark.run, mark.number) != (run, number):
        raise _bad(path, "of another run" if mark.run != run else f"a copy of shard {mark.number}")
    return columns, mark.batches


def _bad(path: Path, how: str) -> ValueError:
    return ValueError(f"{path} is {how}; robust_radii with resume=True computes it again")


def _read_npz(path: Path) -> tuple[Columns, str]:
    # Opened here, because np.load leaves a file open that it finds damaged.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        columns = {name: archive[name] for name in archive.files}
    return columns, str(columns.pop(_MARK))


def _write_npz(columns: Columns, mark: str, path: Path) -> None:
    arrays: dict[str, Any] = {**columns, _MARK: np.array(mark)}
    with path.open("wb") as file:  # to a name, numpy would add .npz
        np.savez(file, **arrays)


def _read_parquet(path: Path) -> tuple[Columns, str]:
    # ParquetFile, because read_table would look for columns in the names of the folders.
    with need_parquet().ParquetFile(path) as file:
        table = file.read()
    columns = {name: table[name].to_numpy().copy() for name in table.column_names}
    return columns, table.schema.metadata[_MARK.encode()].decode()


def _write_parquet(columns: Columns, mark: str, path: Path) -> None:
    import pyarrow

    # Not a column, because readers of the folder take it as one table.
    table = pyarrow.table(columns).replace_schema_metadata({_MARK: mark})
    need_parquet().write_table(table, path)


def need_parquet() -> Any:
    """The module that reads and writes Parquet."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("format 'parquet' needs pyarrow: pip install pyarrow") from error
    return parquet


_Read = Callable[[Path], tuple[Columns, str]]
_Write = Callable[[Columns, str, Path], None]
FORMATS: dict[str, tuple[_Read, _Write]] = {
    "npz": (_read_npz, _write_npz),
    "parquet": (_read_parquet, _write_parquet),
}
