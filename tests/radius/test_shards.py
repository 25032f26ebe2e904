"""Runs over a data set that write their results as they go, and go on after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import RowExact, uniform
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

import rat_ext
from rat_ext import RadiusShards, robust_radii
from rat_ext.radius.shards import write_manifest

N, BATCH, PER_SHARD = 103, 5, 2  # 21 batches, 11 shards; the last of each is smaller


class Indexed(Dataset):
    """Samples whose target is their index; remembers which were loaded."""

    def __init__(self, n: int = N) -> None:
        self.x, self.loaded = uniform(n, 12), []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded.append(index)
        return self.x[index], index


class Stream(IterableDataset):
    def __iter__(self):
        data = Indexed()
        return iter([data[i] for i in range(len(data))])


def run(out: Path | str, data: Dataset | None = None, **options) -> RadiusShards:
    loader = DataLoader(data or Indexed(), batch_size=BATCH)
    settings = {"batches_per_shard": PER_SHARD, "progress": False, **options}
    return robust_radii(RowExact(), loader, out=out, **settings)


def columns(shards: RadiusShards) -> dict[str, Tensor]:
    parts = list(shards)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_same(shards: RadiusShards, other: RadiusShards) -> None:
    """Bit for bit, and each sample once."""
    left, right = columns(shards), columns(other)
    assert torch.equal(left["target"], torch.arange(N))
    assert left.keys() == right.keys()
    for name, column in left.items():
        assert torch.equal(column, right[name]), name


def reopen(shards: RadiusShards, lost: list[int]) -> None:
    """Make a complete run one that has still to compute some shards."""
    unfinished = {"complete": False, "batches_done": None, "shards": None}
    write_manifest(shards.folder, shards.manifest | unfinished)
    for number in lost:
        shards.path(number).unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RadiusShards:
    return run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_holds_what_is_returned_without_a_folder(tmp_path: Path, format: str, capsys) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow")
    shards = run(tmp_path / "runs" / "a", format=format, progress=True)
    assert "robust radius: 100%" in capsys.readouterr().err
    assert shards.complete
    assert len(shards) == 11
    data = Indexed()
    loader = DataLoader(data, batch_size=BATCH)
    expected = robust_radii(RowExact(), loader, progress=False)
    loaded = shards.load()
    for name in expected._fields:
        assert torch.equal(getattr(loaded, name), getattr(expected, name)), name
    result = rat_ext.robust_radius(RowExact(), data.x, full=True)
    for name, column in columns(shards).items():
        if name != "target":
            assert torch.equal(column, getattr(result, name)), name


def test_pandas_reads_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    dataset = pytest.importorskip("pyarrow.dataset")
    run(tmp_path / "out", format="parquet")
    table = dataset.dataset(tmp_path / "out").to_table()  # what pandas.read_parquet does
    assert sorted(table["target"].to_pylist()) == list(range(N))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=BATCH),
        DataLoader(TensorDataset(uniform(N, 12), torch.arange(N)), batch_size=BATCH, num_workers=1),
        list(zip(uniform(N, 12).split(BATCH), torch.arange(N).split(BATCH), strict=True)),
        DataLoader(
            TensorDataset(uniform(N, 12), torch.arange(N)),
            sampler=[list(range(i, min(i + BATCH, N))) for i in range(0, N, BATCH)],
            batch_size=None,
        ),
    ],
    ids=["stream", "workers", "list", "no automatic batches"],
)
def test_kinds_of_loaders(loader, whole: RadiusShards, tmp_path: Path) -> None:
    def go(resume: bool) -> RadiusShards:
        settings = {"batches_per_shard": PER_SHARD, "progress": False, "resume": resume}
        return robust_radii(RowExact(), loader, out=tmp_path / "out", **settings)

    first = go(False)
    assert_same(first, whole)
    reopen(first, [3, 10])
    kept = {path: path.stat().st_mtime_ns for path in first.folder.glob("radii-*")}
    assert_same(go(True), whole)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_without_targets(tmp_path: Path) -> None:
    x = uniform(9, 12)
    shards = robust_radii(RowExact(), x.split(4), out=tmp_path / "out", progress=False)
    assert shards.load().target is None
    assert torch.equal(shards.load().radius, rat_ext.robust_radius(RowExact(), x))


HERE = os.pathsep.join(str(path) for path in Path(__file__).parents[:2])

# --- Kills ----------------------------------------------------------------------------------------

# Stops for good at the third file, the second shard's, whose temporary file is written already.
KILLED = """
import os, signal, sys, time
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_shards import run
replace, files = os.replace, []
def stop(source, target):
    files.append(target)
    if len(files) == 4:
        time.sleep(600)
    replace(source, target)
os.replace = stop
run(sys.argv[2])
"""


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> Path:
    deadline = time.monotonic() + 120
    while not (found := list(folder.glob(pattern))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_goes_on_after_a_kill(whole: RadiusShards, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, HERE, str(out)])
    half_written = wait_for(out, ".radii-000002.npz.tmp*", process)
    with pytest.raises(
        BlockingIOError, match=rf"by robust_radii, process {process.pid} on .* since"
    ):
        run(out, resume=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    half_written.write_bytes(half_written.read_bytes()[:100])

    shards = RadiusShards(out)
    assert not shards.complete
    assert shards.numbers() == [0, 1]
    assert columns(shards)["target"].tolist() == list(range(20))
    with pytest.raises(ValueError, match="is not complete"):
        shards.load()
    with pytest.raises(FileExistsError, match="has a part of the radii of a run"):
        run(out)
    kept = {path: path.read_bytes() for path in out.glob("radii-*")}

    data = Indexed()
    assert_same(run(out, data, resume=True), whole)
    assert data.loaded == [*range(5), *range(20, N)]  # the first batch again, to compare it
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert [path.name for path in out.glob(".*")] == [".lock"]

    data = Indexed()
    assert_same(run(out, data, resume=True), whole)
    assert data.loaded == list(range(5))
    with pytest.raises(FileExistsError, match="has all of the radii of a run"):
        run(out)


TWO = """
import os, sys, traceback
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch.distributed as dist
from test_shards import Indexed, run
out, rank, store = sys.argv[2], int(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
data, status = Indexed(), 0
try:
    shards = run(out, data, resume=True)
    assert shards.complete and len(shards) == 11
    print(*data.loaded, flush=True)
    dist.barrier()
except BaseException:
    status = 1
    traceback.print_exc()
    sys.stderr.flush()
os._exit(status)  # gloo's threads may meet the end of the interpreter, and hang or abort
"""


def run_by_two(out: Path, store: Path) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each process."""
    command = [sys.executable, "-c", TWO, HERE, str(out)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(store)], **settings) for rank in (0, 1)]
    try:
        printed = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()  # nothing, where it has ended
    return [(p.returncode, *texts) for p, texts in zip(processes, printed, strict=True)]


@pytest.mark.parametrize("finished", [False, True])
def test_two_processes_share_the_shards(
    finished: bool, whole: RadiusShards, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole.folder, out)
    shards = RadiusShards(out)
    if not finished:
        reopen(shards, [])
    for number in (0, 1, 2, 5):
        shards.path(number).unlink()
    for number in (6, 9):
        shards.path(number).write_bytes(b"PK")
    results = run_by_two(out, tmp_path / "store")
    assert [status for status, _, _ in results] == [0, 0], results
    assert [list(map(int, printed.split())) for _, printed, _ in results] == [
        [*range(5), *(i for number in share for i in range(10 * number, 10 * number + 10))]
        for share in ([0, 2, 6], [1, 5, 9])
    ]
    assert_same(RadiusShards(out), whole)


# --- Errors ---------------------------------------------------------------------------------------


def test_a_run_of_something_else_is_not_resumed(whole: RadiusShards) -> None:
    def refused(message: str, model: nn.Module | None = None, loader=None, **options) -> None:
        loader = loader or DataLoader(Indexed(), batch_size=BATCH)
        settings = {"batches_per_shard": PER_SHARD, "out": whole.folder, "resume": True, **options}
        with pytest.raises(ValueError, match=message):
            robust_radii(model or RowExact(), loader, progress=False, **settings)

    refused("rtol was 0.01, is 0.02. Use the same, or another folder", rtol=0.02)
    refused("method was bs, is fast", method="fast")
    refused("batches_per_shard was 2, is 3", batches_per_shard=3)
    refused("the model has other weights", RowExact(seed=1))
    refused("batches was 21, is 20", loader=DataLoader(Indexed(100), batch_size=BATCH))
    other = TensorDataset(uniform(N, 12, seed=1), torch.arange(N))
    refused("first batch has other inputs", loader=DataLoader(other, batch_size=BATCH))


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (DataLoader(Indexed(), shuffle=True), {}, "the loader shuffles"),
        (
            DataLoader(Indexed(), sampler=DistributedSampler(Indexed(), 2, 0)),
            {},
            "has a DistributedSampler",
        ),
        ([], {}, "the loader gave no batch"),
        (DataLoader(Indexed(0)), {}, "the loader gave no batch"),
        ([(uniform(2, 12), torch.zeros(2, 3))], {}, "targets have shape"),
        ([uniform(2, 12)], {"format": "csv"}, "format is 'csv'; expected 'npz' or 'parquet'"),
        ([uniform(2, 12)], {"batches_per_shard": 0}, "batches_per_shard is 0"),
        ([uniform(2, 12)], {"method": "slow"}, "method is 'slow'"),
        ([uniform(2, 12)], {"out": None, "resume": True}, "resume=True needs the folder out"),
    ],
)
def test_errors(loader, options: dict, message: str, tmp_path: Path) -> None:
    settings = {"out": tmp_path / "out", "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        robust_radii(RowExact(), loader, **settings)


def test_without_a_run_or_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="holds no radii"):
        RadiusShards(tmp_path)
    pytest.importorskip("pyarrow")
    shards = run(tmp_path / "out", format="parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        shards.load()  # which are not damaged for that
    with pytest.raises(ImportError, match="pip install pyarrow"):
        run(tmp_path / "parquet", format="parquet")
    assert not (tmp_path / "parquet").exists()


# --- Memory ---------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch, rat_ext
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Linear(2, 2)
peaks = []
for samples in (40_000, 500_000):
    loader = (torch.rand(4000, 2) for _ in range(samples // 4000))
    settings = {"out": sys.argv[1 + len(peaks)], "method": "fast", "progress": False}
    shards = rat_ext.robust_radii(model, loader, batches_per_shard=2, **settings)
    assert sum(len(shard["radius"]) for shard in shards) == samples
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print((peaks[1] - peaks[0]) / 1024)
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("few", "many")]
    command = [sys.executable, "-c", MEMORY, *folders]
    grown = float(subprocess.check_output(command, timeout=120))
    bytes_written = sum(path.stat().st_size for path in Path(folders[1]).glob("radii-*"))
    assert bytes_written > 16 * 2**20
    assert grown < 8  # MiB
    assert np.isfinite(grown)
