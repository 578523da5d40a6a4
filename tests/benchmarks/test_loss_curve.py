"""The loss curve of a patched run beside stock's, on the CPU and shorter: it follows, and with an error planted it does
not."""

import json
from unittest import mock

import pytest
import torch

from benchmarks import gpu, loss_curve
from pyfast import dispatch, ops
from pyfast.ops import lora

SHORT = loss_curve.Setup(steps=60, seq=256, hidden=128, layers=2, lr=1e-3)


@pytest.fixture(scope="module", autouse=True)
def own_data():
    """The project's own reviews, so that the tests are the same everywhere."""
    if reason := dispatch.unavailable("cpu"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_curve.machine, "data_folder", lambda: None)
        yield


@pytest.fixture(scope="module")
def stock():
    """The curves of the two stock runs."""
    name, curves = loss_curve.curves_of(SHORT, "cpu", [loss_curve.TRUTH, loss_curve.STOCK])
    assert name == "the project's own reviews"
    return curves


def patched() -> torch.Tensor:
    return loss_curve.curves_of(SHORT, "cpu", ["pyfast"])[1]["pyfast"]


def test_a_patched_run_follows_stock(stock):
    assert loss_curve.judge(stock | {"pyfast": patched()}) == {}


def softmax_scale():
    real = ops.attention_varlen
    return mock.patch.object(ops, "attention_varlen", lambda *a, **k: real(*a, **k | {"scale": 2 * k["scale"]}))


def sequences_see_each_other():
    real = ops.attention_varlen

    def varlen(q, k, v, *_, **options):
        whole = torch.tensor([0, len(q)], dtype=torch.int32)
        return real(q, k, v, whole, whole, len(q), len(q), **options)

    return mock.patch.object(ops, "attention_varlen", varlen)


def lora_scaling_dropped_in_backward():
    real = lora._kernel_arguments

    def arguments(*given):
        weight, lora_A, lora_B, scaling, *others = real(*given)
        backward = torch._C._current_graph_task_id() != -1
        return weight, lora_A, lora_B, [1.0] * len(scaling) if backward else scaling, *others

    return mock.patch.object(lora, "_kernel_arguments", arguments)


def no_gradient_of_queries():
    real = ops.rope
    return mock.patch.object(ops, "rope", lambda q, *args, **options: real(q.detach(), *args, **options))


def an_eighth_of_the_labels_lost():
    real = ops.linear_cross_entropy

    def loss(x, weight, target, **options):
        return real(x, weight, torch.where(torch.arange(len(target)) % 8 == 0, -100, target), **options)

    return mock.patch.object(ops, "linear_cross_entropy", loss)


ERRORS = [
    softmax_scale,
    sequences_see_each_other,
    lora_scaling_dropped_in_backward,
    no_gradient_of_queries,
    an_eighth_of_the_labels_lost,
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_is_seen(error, stock):
    with error():
        wrong = loss_curve.judge(stock | {"pyfast": patched()})
    assert wrong["pyfast"].startswith("its loss strays by")


def test_a_run_that_learns_nothing_is_no_proof(stock):
    flat = {name: torch.full((SHORT.steps,), 5.0) for name in (*stock, "pyfast")}
    assert "teaches nothing" in loss_curve.judge(flat)[loss_curve.TRUTH]
    lost = loss_curve.judge(stock | {"pyfast": torch.full((SHORT.steps,), torch.nan)})
    assert lost.keys() == {"pyfast"}


@pytest.mark.skipif(dispatch.unavailable("emulator") is not None, reason="the emulator was not built")
def test_every_run_is_written(monkeypatch, tmp_path):
    """By the emulator and the interpreter for a GPU's kernels; one that cannot run is named, and ends no other."""
    setup = loss_curve.Setup(steps=4, seq=24, hidden=128, layers=1, lr=1e-3)
    monkeypatch.setattr(loss_curve, "WINDOW", 2)
    available = {"cuda": "emulator"} | ({} if dispatch.unavailable("triton") else {"triton": "triton"})
    monkeypatch.setitem(loss_curve.RUNS, "lost", loss_curve.Run(torch.bfloat16, ("nothing",)))

    def backends(served):
        if served == ("nothing",):
            raise ValueError("there is no such backend")
        return tuple(available[name] for name in served if name in available)

    failed = loss_curve.follow(tmp_path, {"gpu": "none"}, setup, "cpu", backends=backends)
    result = json.loads((tmp_path / "loss_curve.json").read_text())
    assert len(failed) == len(result["failed"]) == 2 and set(result["failed"]) == {"lost", loss_curve.TRUTH}
    assert result["failed"]["lost"] == "ValueError: there is no such backend"
    assert result["loss"].keys() == result["distance"].keys() == loss_curve.RUNS.keys() - {"lost"}
    assert all(distance < 0.02 for distance in result["distance"].values())
    assert (tmp_path / "loss_curve.md").read_text().count("\n| ") == len(loss_curve.RUNS) + 1


def test_gsm8k(data_folder, monkeypatch):
    """Of questions with answers, the answers alone count."""
    monkeypatch.setattr(loss_curve.machine, "data_folder", lambda: data_folder)
    name, rows = loss_curve.batches(loss_curve.Setup(steps=2))
    assert name == "GSM8K"
    for row in rows:
        assert row["input_ids"].shape == (1, 4096)
        counted = row["labels"] != -100
        assert 0.2 < counted.float().mean() < 0.8
        assert torch.equal(row["labels"][counted], row["input_ids"][counted])


def test_make_gpu_asks_for_it(monkeypatch):
    monkeypatch.setattr(loss_curve, "follow", lambda *arguments: arguments)
    assert gpu.PARTS["loss_curve"]("folder", "about", 0.0) == ("folder", "about", loss_curve.Setup(), "cuda")


def test_by_hand(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "folder_of", lambda name: tmp_path / name)
    monkeypatch.setattr(loss_curve, "follow", lambda *arguments: [repr(arguments[2:])])
    assert loss_curve.main(["--device", "cpu", "--steps", "20"]) == 1


def test_without_stock_there_is_nothing_to_compare_with(tmp_path):
    (failed,) = loss_curve.follow(tmp_path, {}, loss_curve.Setup(10, 32, 128, 1), "cpu", ["pyfast"])
    assert failed.endswith("without stock there is nothing to compare with")
