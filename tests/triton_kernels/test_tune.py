"""`pyfast tune` with a timer that is not a GPU: what is searched, kept and written."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton.language", reason="triton is not installed")
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to tune for")
def test_refuses_without_a_gpu():
    from pyfast.cli import app

    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2
    assert result.output.startswith("pyfast tune: tiles are timed on a GPU, which cannot be done here: ")
    assert result.output.count("\n") == 1
    assert "there is no kernel 'attn'" in CliRunner().invoke(app, ["tune", "attn"]).output
