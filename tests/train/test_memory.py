"""--memory-budget: what a step needs is counted, and only as many layers are recomputed as must be."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from train.test_finetune import finetune, loss_curve
from transformers import LlamaConfig, LlamaForCausalLM

from pyfast.train import InputError, memory
from pyfast.train.config import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("0.5 GiB", 2**29), ("300MB", 3 * 10**8), (" 1TB ", 10**12)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "8 parsecs", ""])
def test_what_is_no_size_is_refused(models, files, tmp_path, text):
    with pytest.raises(InputError, match="is not a size: write a number and one of MB, GB"):
        finetune(models["llama"], files["pairs"], tmp_path / "run", memory_budget=text)
    assert not (tmp_path / "run").exists()


def test_allocated_counts_what_lives():
    with memory.Allocated() as allocated:
        a = torch.zeros(1000)
        b = a + 1
        view = b[10:]
        assert allocated.living() == 8000
        del a, b
        assert allocated.living() == 4000
        del view
        c = torch.zeros(100)
        assert allocated.living() == c.nbytes
    assert allocated.peak == 8000


class _Job:
    """A trainer as far as memory is concerned."""

    def __init__(self, size):
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=99
            )
        )
        self.train_dataset = [{"input_ids": list(range(n))} for n in (5, 64, 20)]
        self.args = SimpleNamespace(per_device_train_batch_size=size)
        self.compute_loss_context_manager = contextlib.nullcontext

    def data_collator(self, rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    def recomputed(self):
        return [layer.gradient_checkpointing for layer in memory._layers(self.model)]


def test_as_few_layers_as_the_budget_asks_for(monkeypatch):
    monkeypatch.setattr(memory, "memory_mb", lambda: 0.0)
    monkeypatch.setattr(memory, "SCRATCH", 0)
    job = _Job(size=16)
    batch = job.data_collator([job.train_dataset[1]])
    memory.recompute(job.model, 4)
    least = memory.measure(job, batch)
    memory.recompute(job.model, 0)
    most = memory.measure(job, batch)
    assert least.kept < most.kept / 2
    assert all(p.grad is None for p in job.model.parameters())
    fixed = 3 * sum(p.nbytes for p in job.model.parameters())
    whole = fixed + 16 * memory.SLACK * sum(most)
    half = fixed + 16 * memory.SLACK * ((most.kept + least.kept) / 2 + least.passing)
    for budget, count in ((whole * 1.01, 0), (half * 1.01, 2), (half * 0.99, 3)):
        text = memory.keep_to_budget(job, int(budget))
        assert f"{count} of 4 layers" in text
        assert job.recomputed() == [True] * count + [False] * (4 - count)
    with pytest.raises(InputError, match=r"16 x 64 tokens needs about .* lower --per_device_train_batch_size"):
        memory.keep_to_budget(job, fixed)


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "pyfast"])
def test_a_budget_changes_no_loss(models, files, tmp_path, monkeypatch, stock):
    options = {"logging_steps": 1, "learning_rate": 1e-3, "lora_dropout": 0.1, "stock": stock}
    free = finetune(models["llama"], files["pairs"], tmp_path / "free", **options)
    counts = []
    choose = memory.recompute
    monkeypatch.setattr(memory, "recompute", lambda model, count: counts.append(count) or choose(model, max(count, 1)))
    kept = finetune(models["llama"], files["pairs"], tmp_path / "kept", memory_budget="64GB", **options)
    assert counts[-1] == 0
    assert loss_curve(kept) == pytest.approx(loss_curve(free), abs=1e-6)


def test_gradient_checkpointing_beside_a_budget_is_refused(models, files, tmp_path):
    with pytest.raises(InputError, match="give one of them"):
        finetune(models["llama"], files["pairs"], tmp_path, memory_budget="8GB", gradient_checkpointing=True)
