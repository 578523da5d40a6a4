import copy

import psutil
import pytest
import torch
from hf.tiny import batch, stock

import pyfast
from pyfast import ops, verification
from pyfast.hf.swap import stock_class

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "case, adapter, kind, dtype",
    [
        ("llama", "lora", "left", FP32),
        ("llama", "head", "packed", BF16),
        ("mistral", "none", "packed", FP32),
        ("gemma2", "lora", "right", BF16),
        ("gpt2", "lora", "left", BF16),
        ("bert-sequence", "lora", "right", FP32),
        ("bert-token", "lora", "right", BF16),
        ("bert-sequence", "none", "left", FP32),
    ],
)
def test_right_models_pass_and_planted_errors_are_caught(case, adapter, kind, dtype):
    report = pyfast.verify(stock(case, dtype, adapter), batch(case, kind), mutate=True)
    assert report.passed, str(report)
    assert report.precision == torch.float64
    assert report.dtype == dtype
    assert {"loss", "eval loss", "logits"} < {row.name for row in report.compared}
    planted = {p.op for p in report.planted}
    assert planted & {"attention", "attention_varlen"}
    assert planted & {"rms_norm", "layer_norm"}
    if adapter != "none":
        assert "lora_mlp" in planted
    assert len(report.planted) >= 6
    assert "PASSED" in str(report)
    assert "Known errors" in str(report)


def test_every_trainable_parameter_is_compared():
    model = stock("llama", FP32, "lora")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names <= {row.name for row in pyfast.verify(model, batch("llama")).compared}


@pytest.mark.parametrize("mutation", verification.MUTATIONS[::7], ids=lambda m: f"{m.op}: {m.error}")
def test_a_wrong_kernel_fails(mutation, monkeypatch):
    """The same errors, but in the op for good: the report fails and names tensors."""
    with verification._planted(mutation) as uses:
        report = pyfast.verify(stock("llama", FP32, "lora"), batch("llama", "left"))
        text = str(report)
    if uses:
        assert not report.passed
        assert text.endswith("FAILED")
        assert "WRONG" in text or "no gradient" in text


def test_a_nan_fails(monkeypatch):
    def rms_norm(x, weight, *args, **kwargs):
        return ops.norm.rms_norm(x, weight * float("nan"), *args, **kwargs)

    monkeypatch.setattr(ops, "rms_norm", rms_norm)
    assert not pyfast.verify(stock("llama", FP32, "lora"), batch("llama")).passed


def test_a_planted_error_that_nothing_shows_fails_the_report():
    report = pyfast.verify(stock("llama", FP32, "lora"), batch("llama"))
    assert report.passed
    report.planted.append(verification.Planted("rope", "an error", None))
    assert not report.passed
    assert "NOT CAUGHT" in str(report)


@pytest.mark.parametrize("patched", [False, True])
def test_everything_stays_as_it_was(patched):
    model, inputs = stock("llama", FP32, "lora"), batch("llama", "left")
    if patched:
        pyfast.patch(model, ops=["rms_norm", "attention", "rope", "lora_linears"])
    model(**inputs).loss.backward()
    next(model.modules()).eval()
    next(m for m in model.modules() if isinstance(m, torch.nn.Dropout | torch.nn.Identity)).train()
    parameters = dict(model.named_parameters())
    before = {
        "weights": {n: p.detach().clone() for n, p in parameters.items()},
        "gradients": {n: p.grad for n, p in parameters.items()},
        "values": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "training": [m.training for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "attention": model.config._attn_implementation,
        "inputs": copy.deepcopy(inputs),
    }
    random = torch.get_rng_state()
    functions = {name: getattr(ops, name) for name in ops.__all__}
    assert pyfast.verify(model, inputs, mutate=True).passed
    assert torch.equal(torch.get_rng_state(), random)
    after = dict(model.named_parameters())
    assert all(after[n] is p and torch.equal(p, before["weights"][n]) for n, p in parameters.items())
    for name, p in parameters.items():
        assert p.grad is before["gradients"][name]
        assert p.grad is None or torch.equal(p.grad, before["values"][name])
    assert [m.training for m in model.modules()] == before["training"]
    assert [type(m) for m in model.modules()] == before["classes"]
    assert model.config._attn_implementation == before["attention"]
    assert all(torch.equal(inputs[k], v) for k, v in before["inputs"].items())
    assert {name: getattr(ops, name) for name in ops.__all__} == functions


def test_a_patch_is_checked_as_it_is():
    """Only what the user patched is used, not all that could be."""
    model = stock("llama", FP32, "lora")
    pyfast.patch(model, ops=["rms_norm"])
    report = pyfast.verify(model, batch("llama"), mutate=True)
    assert report.passed
    assert {p.op for p in report.planted} == {"rms_norm"}
    assert any(stock_class(m) is not type(m) for m in model.modules())


def test_dropout_is_off_for_the_check_alone():
    model = stock("bert-sequence", FP32, "none")
    model.config.attention_probs_dropout_prob = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    probabilities = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    report = pyfast.verify(model, batch("bert-sequence", "right"))
    assert report.passed, str(report)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == probabilities
    assert model.config.attention_probs_dropout_prob == 0.5


def test_queries_without_keys_are_left_out():
    """The last padding predicts the first token from no key at all: its label does not count, nor do its logits."""
    model, inputs = stock("llama", FP32, "lora"), batch("llama", "left")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    report = pyfast.verify(model, inputs)
    assert report.passed, str(report)
    assert report.left_out == (int((inputs["attention_mask"] == 0).sum()), 2)
    assert "queries without keys" in str(report)


def test_gradient_checkpointing():
    model = stock("llama", FP32, "lora")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert pyfast.verify(model, batch("llama", "right"), mutate=True).passed


@pytest.mark.parametrize("case, kind, dtype", [("llama", "left", FP32), ("bert-sequence", "right", BF16)])
def test_the_weaker_check(case, kind, dtype, monkeypatch):
    """Without memory for a copy, patched against stock: it says so, passes, and still catches gross errors."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    report = pyfast.verify(stock(case, dtype, "lora"), batch(case, kind), mutate=True)
    assert report.precision is None
    assert all(row.passed for row in report.compared), str(report)
    assert "Weaker check" in str(report)
    caught = [p for p in report.planted if p.caught_by is not None]
    assert len(caught) >= 0.8 * len(report.planted)


def test_fp32_truth_for_a_16_bit_model(monkeypatch):
    """Memory for four bytes per weight but not for eight."""
    model = stock("llama", BF16, "lora")
    weights = sum(p.numel() for p in model.parameters())
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    need = 1.5 * (4 * (weights + gradients) + 4 * gradients)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": need * 1.1}))
    report = pyfast.verify(model, batch("llama"), mutate=True)
    assert report.precision == FP32
    assert report.passed, str(report)


def test_verify_is_a_function_however_often_it_is_used():
    assert callable(pyfast.verify)
    assert pyfast.verify is pyfast.verify


@pytest.mark.parametrize(
    "model, inputs, error, words",
    [
        (torch.nn.Linear(2, 2), {}, TypeError, "Linear"),
        ("llama", {}, TypeError, "str"),
        (None, [1, 2], TypeError, "batch is list"),
        (None, {"input_ids": torch.ones(1, 2, dtype=torch.long)}, ValueError, "no labels"),
    ],
)
def test_bad_input(model, inputs, error, words):
    with pytest.raises(error, match=words):
        pyfast.verify(stock("llama") if model is None else model, inputs)


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="requires a gradient"):
        pyfast.verify(stock("llama").requires_grad_(False), batch("llama"))
