"""`pyfast tune` with a timer that is not a GPU: what is searched, kept and written."""

import json
import math
import multiprocessing
import os
import time
from functools import partial
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton.language", reason="triton is not installed")
from triton.backends.compiler import GPUTarget

from benchmarks import launches, tune
from pyfast.kernels import launch
from pyfast.kernels.tiles import TILES


def test_every_kernel_has_a_space_with_its_tiles_options():
    assert tune.SPACE.keys() == TILES.keys() == launches.CASES.keys()
    for kernel, table in TILES.items():
        options = {name for _, tile in table["default"] for name in tile}
        assert tune.SPACE[kernel].keys() == options, kernel
        for _, size in launches.classes(kernel, "sm_90"):
            assert 5 <= len(tune.candidates(kernel, size, 32)) <= 150, (kernel, size)


def test_candidates_fit_a_program():
    """On AMD GPUs, whose warps have 64 threads, too."""
    for tile in tune.candidates("norm_kernel", 8192, 64):
        assert tile["num_warps"] <= 16
        assert tile["ROWS"] * 8192 <= tune.MOST_ELEMENTS


def test_the_fastest_is_kept():
    best = {64: (64, 128), 128: (128, 32), 256: (64, 32)}

    def measure(size, tile):
        if tile is None:
            return 2.0
        return 1.0 if (tile["BLOCK_M"], tile["BLOCK_N"]) == best[size] and tile["num_warps"] == 8 else 3.0

    rows = tune.search("attention_kernel", "sm_90", 32, measure)
    assert [row["up_to"] for row in rows] == [64, 128, None]
    for row, size in zip(rows, best, strict=True):
        assert (row["tile"]["BLOCK_M"], row["tile"]["BLOCK_N"]) == best[size]
        assert (row["ms"], row["before_ms"]) == (1.0, 2.0)


def test_noise_and_tiles_that_do_not_run_change_nothing():
    def measure(size, tile):
        if tile is None:
            return 1.0
        return 0.99 if tile["num_stages"] == 3 else math.inf

    rows = tune.search("attention_kernel", "sm_90", 32, measure)
    assert [(row["up_to"], row["tile"]) for row in rows] == TILES["attention_kernel"]["default"]


def test_one_class_where_one_tile_is_best():
    rows = tune.search(
        "norm_kernel", "sm_90", 32, lambda size, tile: 1.0 if (tile or {}) == {"ROWS": 1, "num_warps": 8} else 2.0
    )
    assert [(row["up_to"], row["tile"]) for row in rows] == [(None, {"ROWS": 1, "num_warps": 8})]


def test_a_tile_that_is_right_once_is_not_kept():
    seen = []

    def measure(size, tile):
        seen.append(tile)
        return 2.0 if tile is None else 1.0 if seen.count(tile) == 1 else math.inf

    rows = tune.search("rope_kernel", "sm_90", 32, measure)
    assert [row["tile"] for row in rows] == [tile for _, tile in TILES["rope_kernel"]["default"]]


def test_no_tile_runs():
    with pytest.raises(RuntimeError, match="no tile of rope_kernel runs on sm_90"):
        tune.search("rope_kernel", "sm_90", 32, lambda size, tile: math.inf)


def test_written_tables_are_read(tmp_path):
    """In the shape that kernels/tiles.py reads; kernels that were not tuned keep their rows."""
    row = {"up_to": None, "tile": {"ROWS": 8, "num_warps": 2}, "ms": 0.1, "before_ms": 0.2}
    tune.write(tmp_path, "sm_90", {"gpu": "a"}, {"rope_kernel": [row]})
    path = tune.write(tmp_path, "sm_90", {"gpu": "b"}, {"norm_kernel": [row | {"up_to": 256}, row]})
    found = json.loads(path.read_text())
    assert path.name == "tiles_sm_90.json"
    assert found["machine"] == {"gpu": "b"}
    assert found["tiles"] == {"rope_kernel": [row], "norm_kernel": [row | {"up_to": 256}, row]}
    source = (tune.Path(launch.__file__).parent / "tiles.py").read_text()
    (tmp_path / "tiles.py").write_text(source)
    namespace = {"__file__": str(tmp_path / "tiles.py")}
    exec(compile(source, namespace["__file__"], "exec"), namespace)
    assert namespace["TILES"]["norm_kernel"]["sm_90"] == [(256, row["tile"]), (None, row["tile"])]
    assert namespace["TILES"]["rope_kernel"]["default"] == TILES["rope_kernel"]["default"]


def test_a_measurement(kernel, monkeypatch):
    """Through the launcher with the tile asked for, the kernel's own launch timed; the table and `run` are put back; a
    tile whose result differs is not used."""
    seen, wrong = [], []

    def call(size, dtype):
        y = launch.launchers()["gated"](torch.randn(3, 2 * size)[:, :size], torch.randn(3, size), "silu")
        return y + 1 if wrong else y

    def do_bench(again, **_):
        seen.append(TILES["gated_kernel"]["interpreter"])
        again()
        return 0.5

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setitem(launches.CASES, "gated_kernel", launches.Case(40, {"": call}, None))
    table, run = TILES["gated_kernel"]["interpreter"], launch.run
    measure, tile = tune.Gpu("gated_kernel", torch.device("cpu")), {"ROWS": 2, "BLOCK": 16}
    assert measure(40, None) == measure(40, tile) == 0.5
    assert seen == [table, [(None, tile)]]
    wrong.append(True)
    assert measure(40, tile) == math.inf
    assert TILES["gated_kernel"]["interpreter"] is table
    assert launch.run is run


def test_a_tile_that_does_not_compile_is_passed_over(monkeypatch):
    def call(size, dtype):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setitem(launches.CASES, "gated_kernel", launches.Case(40, {"": call}, None))
    assert tune.Gpu("gated_kernel", torch.device("cpu"))(40, {"ROWS": 2, "BLOCK": 16}) == math.inf


def test_a_tile_that_takes_the_gpu_with_it_ends_all(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setitem(launches.CASES, "rope_kernel", launches.Case(128, {"": fail}, None))
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "Ahead", mock.Mock())
    target = GPUTarget("cuda", 90, 32)
    left_out = tune.tune(["rope_kernel", "norm_kernel"], torch.device("cuda"), target, tmp_path, {}, math.inf)
    assert left_out == ["rope_kernel", "norm_kernel"] and not list(tmp_path.iterdir())
    words = (
        "the GPU is lost to this process by rope_kernel for size 128 with None: CUDA error: an illegal memory access"
    )
    assert words in capsys.readouterr().out


def test_agree():
    """Another order of sums passes; a wrong row or column does not, though it is little of the whole."""
    torch.manual_seed(0)
    truth = torch.randn(400, 64)
    assert tune._agree([truth + 2e-3 * torch.randn(400, 64)], [truth])
    for place in ((7, slice(None)), (slice(None), 7)):
        wrong = truth.clone()
        wrong[place] *= 1.05
        assert (wrong - truth).norm() < 1e-2 * truth.norm()
        assert not tune._agree([wrong], [truth])
    assert not tune._agree([truth * torch.nan], [truth])


def test_no_tile_is_tried_after_the_deadline():
    tried = []
    tune.search("rope_kernel", "sm_90", 32, lambda size, tile: tried.append(tile) or 1.0, time.monotonic() - 1)
    assert tried == [None]


def test_tiles_compile_ahead(monkeypatch):
    """In processes of their own, for a GPU that is not here; one that the compiler refuses is no tile."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    compile_one = partial(tune.compile_tile, GPUTarget("cuda", 90, 32), "sm_90", torch.bfloat16)
    good, bad = {"ROWS": 8, "num_warps": 2}, {"ROWS": 24, "num_warps": 2}
    ahead = tune.Ahead([("rope_kernel", 128, good), ("rope_kernel", 128, bad)], compile_one, 1)
    try:
        assert ahead.done("rope_kernel", 128, good)
        assert not ahead.done("rope_kernel", 128, bad)
    finally:
        ahead.stop()


def die(kernel, size, tile):
    return os._exit(1) if kernel == "b" else True


def test_a_compiler_that_ends_its_process(monkeypatch):
    """Costs the other tiles of that kernel alone."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(tune.multiprocessing, "get_context", lambda _: fork)
    ahead = tune.Ahead([(kernel, size, {}) for kernel in "abc" for size in (1, 2)], die, 1)
    assert ahead.done("a", 1, {})
    assert not ahead.done("b", 1, {})
    assert not ahead.done("b", 2, {})
    assert ahead.done("c", 1, {}) and ahead.done("c", 2, {})
    ahead.stop()


def test_tune(monkeypatch, tmp_path, capsys):
    """Every kernel is written as it is done; one without a tile that runs, and one without time, are named."""

    class Ahead:
        def __init__(self, jobs, compile_one, workers):
            assert {kernel for kernel, _, _ in jobs} == {"rope_kernel", "gated_kernel", "norm_kernel"} and workers >= 1

        def done(self, kernel, size, tile):
            return tile["num_warps"] != 2

        def stop(self):
            pass

    class Gpu:
        dtype = torch.bfloat16

        def __init__(self, kernel, device):
            self.kernel = kernel

        def __call__(self, size, tile):
            if self.kernel == "gated_kernel":
                clock.append(100.0)
                return math.inf
            assert tile is None or tile["num_warps"] != 2  # it did not compile
            return 2.0 if tile is None else 1.0 + tile["ROWS"] / 1000

    clock = [0.0]
    monkeypatch.setattr(tune, "Ahead", Ahead)
    monkeypatch.setattr(tune, "Gpu", Gpu)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[-1])
    kernels, target = ["rope_kernel", "gated_kernel", "norm_kernel"], GPUTarget("cuda", 90, 32)
    assert tune.tune(kernels, torch.device("cpu"), target, tmp_path, {}, 50.0) == ["norm_kernel"]
    found = json.loads((tmp_path / "tiles_sm_90.json").read_text())["tiles"]
    assert found.keys() == {"rope_kernel"} and found["rope_kernel"][0]["tile"] == {"ROWS": 8, "num_warps": 4}
    printed = capsys.readouterr().out
    assert "rope_kernel: 1 tiles, 0.992 ms saved" in printed
    assert "gated_kernel: no tile of gated_kernel runs on sm_90" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to tune for")
def test_refuses_without_a_gpu():
    from pyfast.cli import app

    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2
    assert result.output.startswith("pyfast tune: tiles are timed on a GPU, which cannot be done here: ")
    assert result.output.count("\n") == 1
    assert "there is no kernel 'attn'" in CliRunner().invoke(app, ["tune", "attn"]).output
