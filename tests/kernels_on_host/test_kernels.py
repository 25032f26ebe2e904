"""The CUDA kernels' bodies, run on the CPU by host_launcher.cpp, against the CPU core.

And, where the core was built with CUDA, that the kernels are in it for every architecture.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import test_core
import torch
from elftools.elf.elffile import ELFFile
from helpers import RowExact, uniform

import rat_ext
from rat_ext import _build_info, _core
from rat_ext._core import core
from rat_ext.search import bracket_search, tensors
from rat_ext.search.tensors import ray_room

ROOT = Path(__file__).resolve().parents[2]
DTYPES = test_core.DTYPES
pytestmark = pytest.mark.core

ORDERS = [1, 2, 3]
"""How the host build orders a block's threads between two barriers."""


def new_state(module: ModuleType, n: int, classes: int, dtype: torch.dtype, probes: int = 1):
    return test_core.new_state(module, n, classes, dtype, probes, temperature=0.7)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 31, 33, 1024, 1025, 3000])
def test_compact_is_stable_at_every_size(n, order, on_host):
    generator = torch.Generator().manual_seed(n)
    state, brackets, *_ = new_state(on_host, n, 2, torch.float32)
    status = torch.randint(0, 2, (n,), generator=generator)
    brackets[:, test_core.COLUMN["status"]] = status.float()
    index = torch.randperm(n, generator=generator).int()
    kept = [i for i in index.tolist() if status[i] == core.ACTIVE]
    count = torch.empty(1, dtype=torch.int32)
    on_host.compact(index, state, index, count, threads=order)
    assert count.item() == len(kept)
    assert index[: len(kept)].tolist() == kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 7, 8, 105, 1024, 5003])
@pytest.mark.parametrize("probes", [1, 3])
def test_perturb_at_every_alignment(dtype, elements, probes, on_host):
    """Rows that start anywhere within 16 bytes, and nothing written outside of them."""
    for x_shift, out_shift, order in [(0, 0, 1), (1, 1, 2), (3, 3, 3), (2, 0, 1), (0, 5, 2)]:
        n, slots = 5, 4
        x = uniform(1, x_shift + n * elements, dtype=dtype)[0, x_shift:].view(n, elements)
        generator = torch.Generator().manual_seed(elements)
        shape = (x_shift + n * elements,)
        d = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
        d = d[x_shift:].view(n, elements)
        index = torch.tensor([4, 2, 0, 4], dtype=torch.int32)
        radii = uniform(n, probes, seed=2, dtype=test_core.WIDE[dtype])
        results = []
        for module, where in ((core, 1), (on_host, order)):
            memory = torch.full((slots * probes * elements + 64,), 7.0, dtype=dtype)
            out = memory[out_shift : out_shift + slots * probes * elements]
            out = out.view(slots * probes, elements)
            module.perturb(x, d, index, radii, 0.1, 0.9, out, threads=where)
            results.append(memory)
        assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 31, 33, 129, 1000, 50_000])
@pytest.mark.parametrize("probes", [1, 3])
def test_start_and_advance_agree_with_the_core(dtype, classes, probes, on_host):
    wide = test_core.WIDE[dtype]
    n, rounds = (3, 2) if classes > 10_000 else (6, 4)
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(n, classes + 1, generator=generator).to(dtype)[:, :classes]  # strided
    index = torch.arange(n, dtype=torch.int32)
    drift = torch.randn(n, 1, classes, generator=generator)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if wide == torch.float32 else {}
    sides = []
    for module in (core, on_host):
        state, brackets, _, radii = new_state(module, n, classes, wide, probes)
        seed = torch.empty(n, classes, dtype=dtype)
        module.start(logits, seed, state, 0)
        sides.append((module, state, brackets, radii, seed))
    torch.testing.assert_close(sides[0][4], sides[1][4])
    for module, state, *_ in sides:
        x = uniform(n, 37, dtype=dtype)
        gradient, room = torch.linspace(-1, 1, n * 37).view(n, 37).to(dtype), ray_room(x)
        module.aim(gradient, x, torch.empty(n, 37, dtype=torch.int8), 0.0, 1.0, state, 0, room)
    for turn in range(rounds):
        torch.testing.assert_close(sides[0][2], sides[1][2], equal_nan=True, **tolerance)
        torch.testing.assert_close(sides[0][3], sides[1][3], **tolerance)
        sides[1][3].copy_(sides[0][3])  # so that rounding does not grow from round to round
        sides[1][2].copy_(sides[0][2])
        for module, state, _, radii, _ in sides:
            moved = logits[:, None].float() + 40 * radii[:, :, None].float() * drift
            moved = moved.flatten(0, 1).to(dtype)
            module.advance(moved, index, state, threads=1 + turn % len(ORDERS))
    assert (sides[0][2][:, test_core.COLUMN["rows"]] > 0).sum() == n


@pytest.mark.parametrize("classes", [2, 10, 200, 1000])
def test_the_order_of_threads_changes_no_bit(classes, on_host):
    """It would where a barrier is missing."""
    results = []
    for order in ORDERS:
        state, brackets, gaps, radii = new_state(on_host, 4, classes, torch.float32)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(4, classes, generator=generator)
        seed = torch.empty_like(logits)
        on_host.start(logits, seed, state, 0, threads=order)
        x = uniform(4, 20_000, dtype=torch.float32)
        gradient = torch.randn(x.shape, generator=generator)
        direction = torch.empty(x.shape, dtype=torch.int8)
        on_host.aim(gradient, x, direction, 0.0, 1.0, state, 0, ray_room(x), threads=order)
        index = torch.arange(4, dtype=torch.int32)
        for _ in range(4):
            moved = torch.randn(4, classes, generator=generator)
            on_host.advance(moved, index, state, threads=order)
        results.append(torch.cat([t.flatten() for t in (brackets, gaps, radii, seed)]))
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())
    assert torch.equal(results[0].nan_to_num(), results[2].nan_to_num())


@pytest.mark.parametrize("options", [{}, {"probes": 3}, {"method": "fast"}, {"search": "bisect"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_whole_search_on_the_kernels(options, dtype, on_host, monkeypatch):
    model, x = RowExact(), uniform(7, 12, dtype=dtype)
    expected = rat_ext.robust_radius(model, x, full=True, **options)
    for module in (bracket_search, tensors):
        monkeypatch.setattr(module, "core", on_host)
    actual = rat_ext.robust_radius(model, x, full=True, **options)
    assert torch.equal(actual.found, expected.found)
    assert torch.equal(actual.prediction, expected.prediction)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(actual.radius, expected.radius, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("kernels", [False, True], ids=["core", "kernels"])
@pytest.mark.parametrize("active", [0, 2, 5, 9])
def test_rows_beyond_the_active_count_are_left_alone(kernels, active, request):
    """A captured graph works on all slots, and reads on the device how many are in use."""
    module = request.getfixturevalue("on_host") if kernels else core
    n, classes, probes, used = 5, 7, 2, min(active, 5)
    index = torch.tensor([3, 1, 4, 0, 2], dtype=torch.int32)
    count = torch.tensor([active], dtype=torch.int32)
    x, direction = uniform(n, 40, dtype=torch.float32), torch.ones(n, 40, dtype=torch.int8)
    logits = torch.randn(n * probes, classes, generator=torch.Generator().manual_seed(0))
    sides = []
    for rows, options in [(index, {"active_count": count}), (index[:used], {})]:
        state, brackets, gaps, radii = new_state(module, n, classes, torch.float32, probes)
        module.start(logits[:n], torch.empty(n, classes), state, 0)
        module.aim(x - 0.5, x, direction, 0.0, 1.0, state, 0, ray_room(x))
        out = torch.full((len(rows) * probes, 40), -7.0)
        module.perturb(x, direction, rows, radii, 0.0, 1.0, out, **options)
        module.advance(logits[: len(rows) * probes], rows, state, **options)
        brackets[1, test_core.COLUMN["status"]] = core.FOUND
        kept, number = rows.clone(), count.clone()
        if options:  # in place, the count as well
            module.compact(kept, state, kept, number, active_count=number)
        else:
            module.compact(kept, state, kept, number)
        sides.append((brackets, gaps, radii, out[: used * probes], number, kept[: int(number)]))
        assert (out[used * probes :] == -7).all()
        extrapolated = new_state(module, n, classes, torch.float32)
        module.start(logits[:n], torch.empty(n, classes), extrapolated[0], 0)
        module.extrapolate(logits[: len(rows)], rows, 1e-3, extrapolated[0], **options)
        sides[-1] += (extrapolated[1],)
    for whole, part in zip(*sides, strict=True):
        assert torch.equal(whole.nan_to_num(), part.nan_to_num())
    assert sides[0][4].item() == used - (1 in index[:used])


# --- What the library holds -----------------------------------------------------------------------

_ON_ELEMENTS = ("InspectKernel", "AimKernel", "PlanKernel", "PerturbKernel")
_ON_LOGITS = ("Start", "Advance", "Extrapolate")  # as LogitKernel<Start<...>>
_ELEMENTS = ("d", "f", "NS_4HalfE", "NS_8BFloat16E")
KERNELS = {**dict.fromkeys(_ON_ELEMENTS + _ON_LOGITS, _ELEMENTS), "CompactKernel": ("d", "f")}
"""The kernels and the types, mangled, for which each must be there."""


def fat_binaries(library: Path) -> Iterator[tuple[str, bytes]]:
    """The architecture and the content of each piece of device code in a shared library."""
    with library.open("rb") as file:
        data = ELFFile(file).get_section_by_name(".nv_fatbin").data()
    position = 0
    while position + 16 <= len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, position)
        if magic != 0xBA55ED50:  # padding between the containers, one for each source file
            position += 8
            continue
        entry, position = position + header, position + header + size
        while entry < position:
            kind, _, header, length = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            name = {1: "compute", 2: "sm"}[kind]
            yield f"{name}_{arch}", data[entry + header : entry + header + length]
            entry += header + length


def test_every_kernel_is_built_for_every_architecture():
    archs = _build_info.build_info().cuda_archs
    if not archs:
        pytest.skip("the core was built without CUDA")
    found: dict[str, set[str]] = {}
    for arch, code in fat_binaries(Path(_core.core.__file__)):
        names = found.setdefault(arch, set())
        if arch.startswith("compute"):
            continue  # PTX is kept compressed
        if not code.startswith(b"\x7fELF"):
            pytest.skip("this nvcc compresses the machine code, which the test cannot read")
        symbols = ELFFile(io.BytesIO(code)).get_section_by_name(".symtab").iter_symbols()
        names |= {symbol.name for symbol in symbols if symbol["st_info"]["type"] == "STT_FUNC"}
    assert set(found) == {arch.rstrip("af") for arch in archs}
    for arch, names in found.items():
        for kernel, types in KERNELS.items() if arch.startswith("sm") else ():
            for type_ in types:
                pattern = re.compile(rf"{len(kernel)}{kernel}I{type_}")
                assert any(map(pattern.search, names)), f"{kernel}<{type_}> for {arch}"
