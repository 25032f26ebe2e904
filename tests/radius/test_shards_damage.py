"""Runs whose files were damaged, lost or mixed up, and folders that several want to write to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import RowExact, uniform
from test_shards import BATCH, HERE, PER_SHARD, Indexed, N, assert_same, reopen, run, run_by_two
from torch.utils.data import DataLoader

from rat_ext import RadiusShards, robust_radii
from rat_ext._common.storage import locked, remove_leftovers, write_whole
from rat_ext.radius.shards import MANIFEST

SAMPLES = PER_SHARD * BATCH  # of a shard


@pytest.fixture(scope="module", params=["npz", "parquet"])
def whole(request, tmp_path_factory: pytest.TempPathFactory) -> RadiusShards:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return run(tmp_path_factory.mktemp("runs") / "whole", format=request.param)


@pytest.fixture
def shards(whole: RadiusShards, tmp_path: Path) -> RadiusShards:
    """A copy to damage."""
    shutil.copytree(whole.folder, tmp_path / "out")
    return RadiusShards(tmp_path / "out")


# --- Shards ---------------------------------------------------------------------------------------


def cut(path: Path, whole: RadiusShards) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path, whole: RadiusShards) -> None:
    path.write_bytes(b"")


def flip(path: Path, whole: RadiusShards) -> None:
    """A bit of a radius, which no reader of Parquet notices."""
    content, radius = path.read_bytes(), next(iter(whole))["radius"].numpy()[:1].tobytes()
    where = content.index(radius)
    path.write_bytes(content[:where] + bytes([radius[0] ^ 1]) + content[where + 1 :])


def lose(path: Path, whole: RadiusShards) -> None:
    path.unlink()


def copy_of_another(path: Path, whole: RadiusShards) -> None:
    shutil.copy(whole.path(5), path)


def of_another_run(path: Path, whole: RadiusShards) -> None:
    other = run(path.parent.parent / "other", format=whole.format, rtol=0.1, resume=True)
    shutil.copy(other.path(0), path)


DAMAGE = {
    cut: "is damaged",
    empty: "is damaged",
    flip: "is damaged",
    lose: "is missing",
    copy_of_another: "is a copy of shard 5",
    of_another_run: "is of another run",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_is_noticed_and_computed_again(
    damage: Callable, whole: RadiusShards, shards: RadiusShards
) -> None:
    damage(shards.path(0), whole)
    lost = rf"{shards.path(0).name} {DAMAGE[damage]}.*resume=True computes it again"
    for read in (list, RadiusShards.load):
        with pytest.raises(ValueError, match=lost):
            read(shards)
    assert shards.complete == (damage is not lose)
    for finished in (True, False):
        data = Indexed()
        if not finished:
            reopen(shards, [])
            damage(shards.path(0), whole)
        again = run(shards.folder, data, resume=True, format=shards.format)
        assert again.complete
        assert_same(again, whole)
        assert data.loaded == [*range(BATCH), *range(SAMPLES)]


def test_the_last_shard_is_missed(whole: RadiusShards, shards: RadiusShards) -> None:
    shards.path(10).unlink()
    assert not shards.complete
    with pytest.raises(ValueError, match="is missing"):
        shards.load()
    assert_same(run(shards.folder, resume=True, format=shards.format), whole)


def test_other_files_are_left_alone(whole: RadiusShards, shards: RadiusShards) -> None:
    end = shards.format
    names = [f"radii-000001 (copy).{end}", f"radii-1.{end}", f"radii-0000001.{end}", "radii-a"]
    names += [f"my radii-000001.{end}", f"radii-000099.{end}.old", f"radii-.{end}", ".mine.tmp"]
    for name in names:
        (shards.folder / name).write_text("mine")
    shards.path(3).unlink()
    assert_same(run(shards.folder, resume=True, format=end), whole)
    assert len(shards) == 11
    assert {(shards.folder / name).read_text() for name in names} == {"mine"}


def test_a_shard_beyond_the_last(whole: RadiusShards, shards: RadiusShards) -> None:
    shutil.copy(shards.path(3), shards.path(11))
    assert_same(shards, whole)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"000011.* is not of this run.*delete it"):
            run(shards.folder, resume=True, format=shards.format)
        reopen(shards, [])
    shards.path(11).unlink()
    assert_same(run(shards.folder, resume=True, format=shards.format), whole)


# --- What the run is of ---------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
def test_shards_of_an_unknown_run_are_not_adopted(shards: RadiusShards, resume: bool) -> None:
    (shards.folder / MANIFEST).unlink()
    before = {path: path.read_bytes() for path in shards.folder.glob("radii-*")}
    loader = DataLoader(Indexed(), batch_size=BATCH)
    with pytest.raises(FileExistsError, match=r"but no _run.json.*another folder, or delete them"):
        robust_radii(RowExact(seed=1), loader, out=shards.folder, resume=resume, progress=False)
    assert {path: path.read_bytes() for path in shards.folder.glob("radii-*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "is damaged or was edited"),
        (lambda text: "", "is damaged or was edited"),
        (lambda text: "[1]", "is damaged or was edited"),
        (lambda text: text.replace('"shards": 11', '"shards": 10'), "is damaged or was edited"),
        (lambda text: text.replace('"run"', '"walk"'), "is of an older version"),
    ],
)
def test_a_manifest_that_is_not_right(shards: RadiusShards, change: Callable, message: str) -> None:
    path = shards.folder / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"_run.json {message}.*another folder"):
        RadiusShards(shards.folder)
    with pytest.raises(ValueError, match=rf"_run.json {message}.*another folder"):
        run(shards.folder, resume=True, format=shards.format)


def test_a_data_set_that_grew(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="samples was 103, is 104"):  # as many batches
        run(tmp_path, Indexed(N + 1), resume=True)


@pytest.mark.parametrize("batches", [3, 5])
@pytest.mark.parametrize("finished", [True, False])
def test_a_stream_of_another_length(batches: int, finished: bool, tmp_path: Path) -> None:
    x = uniform(10, 12).split(2)
    settings = {"out": tmp_path, "batches_per_shard": 3, "progress": False}
    shards = robust_radii(RowExact(), iter(x[:4]), **settings)
    if finished:
        for number in range(2):
            shards.path(number).unlink()
    else:
        reopen(shards, [0])
    with pytest.raises(ValueError, match=f"gave {batches} batches, and another number when"):
        robust_radii(RowExact(), iter(x[:batches]), resume=True, **settings)
    robust_radii(RowExact(), iter(x[:4]), resume=True, **settings)
    assert len(shards.load().radius) == 8


# --- One at a time --------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with locked(tmp_path / "out", "this test"):
        message = rf"out is in use by this test, process {os.getpid()} on .+, since 20.*another fol"
        with pytest.raises(BlockingIOError, match=message), locked(tmp_path / "out", "me"):
            pass
        with pytest.raises(BlockingIOError, match="by this test"):
            run(tmp_path / "out")
        results = run_by_two(tmp_path / "out", tmp_path / "store")
        for status, _, errors in results:
            assert status == 1
            assert f"BlockingIOError: {tmp_path / 'out'} is in use by this test" in errors
    # What a dead process left is no lock.
    (tmp_path / "out" / ".lock-holder").write_text("a dead one")
    assert run(tmp_path / "out").complete
    with pytest.raises(RuntimeError, match="let go"), locked(tmp_path / "out", "me"):
        raise RuntimeError("let go")
    with locked(tmp_path / "out", "me"):
        pass


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from rat_ext._common.storage import locked
with locked(Path(sys.argv[2]), "a run with workers"):
    worker = os.fork()
    if not worker:
        time.sleep(600)
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_does_not_keep_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    with (tmp_path / "printed").open("w+") as file:  # a pipe would be open until the worker ends
        process = subprocess.run([sys.executable, "-c", KILLED, HERE, tmp_path], stdout=file)
        assert process.returncode == -signal.SIGKILL
        file.seek(0)
        worker = int(file.read())
    try:
        with locked(tmp_path, "the next run"):
            os.kill(worker, 0)  # it is alive
    finally:
        os.kill(worker, signal.SIGKILL)


def test_writers_of_one_file_do_not_take_each_others(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(temporary: Path) -> None:
        temporary.write_text("outer")
        write_whole(path, lambda other: other.write_text("inner"))
        assert path.read_text() == "inner"

    write_whole(path, write)
    assert path.read_text() == "outer"
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda temporary: temporary.write_text("half") / 0)
    assert list(tmp_path.iterdir()) == [path]


def test_torch_writes_the_same_bytes_again(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        write_whole(tmp_path / "a.pt", lambda to: torch.save({"a": torch.ones(3)}, to))
        contents.append((tmp_path / "a.pt").read_bytes())
    assert contents[0] == contents[1]


def test_leftovers(tmp_path: Path) -> None:
    for name in ("a-1.npz", "b-1.npz"):
        (tmp_path / f".{name}.tmp-0123").touch()
    remove_leftovers(tmp_path, "a-*", "c")
    assert [path.name for path in tmp_path.iterdir()] == [".b-1.npz.tmp-0123"]
