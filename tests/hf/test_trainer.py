"""transformers' Trainer, unmodified, trains a patched model as it trains a stock one."""

import numpy as np
import pytest
import torch
from hf.tiny import VOCAB, stock
from transformers import DataCollatorForTokenClassification, DataCollatorWithFlattening, Trainer, TrainingArguments

import pyfast

datasets = pytest.importorskip("datasets")


def _rows(case, count=24):
    """Ragged rows, with a column that no forward has."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = int(torch.randint(4, 14, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]] if case == "llama" else [x % 3 for x in ids]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels, "text": f"row {i}"})
    return datasets.Dataset.from_list(rows)


class _Pad:
    pad_token_id, padding_side = 0, "right"

    def pad(self, features, **kwargs):
        longest = max(len(f["input_ids"]) for f in features)
        return {
            name: torch.tensor([f[name] + [0] * (longest - len(f[name])) for f in features])
            for name in ("input_ids", "attention_mask")
        }


def _train(model, case, folder, collator=None, **options):
    rows = _rows(case)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        max_steps=4,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(6)),
        data_collator=collator or DataCollatorForTokenClassification(_Pad()),
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids)[p.label_ids != -100].mean())
        },
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_accuracy")}


@pytest.mark.parametrize("case", ["llama", "bert-token"])
def test_trainer(case, tmp_path):
    """Padded batches and gradient accumulation: the same losses, the same evaluation, logits and all."""
    losses, metrics = _train(stock(case, adapter="lora"), case, tmp_path)
    model = stock(case, adapter="lora")
    pyfast.patch(model, strict=True)
    got, got_metrics = _train(model, case, tmp_path)
    np.testing.assert_allclose(got, losses, atol=2e-4)
    assert losses[0] != losses[-1]
    assert got_metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=2e-4)
    assert got_metrics["eval_accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=0.03)


@pytest.mark.parametrize("boundaries", [False, True])
def test_trainer_packs(boundaries, tmp_path):
    """DataCollatorWithFlattening: the losses of padded batches, without padding."""
    padded, _ = _train(stock("llama", adapter="lora"), "llama", tmp_path)
    model = stock("llama", adapter="lora")
    pyfast.patch(model, strict=True)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries)
    got, _ = _train(model, "llama", tmp_path, collator, per_device_eval_batch_size=1)
    np.testing.assert_allclose(got, padded, atol=2e-4)


def test_label_smoothing_finds_its_logits(tmp_path):
    losses, _ = _train(stock("llama", adapter="lora"), "llama", tmp_path, label_smoothing_factor=0.1)
    model = stock("llama", adapter="lora")
    pyfast.patch(model, strict=True)
    got, _ = _train(model, "llama", tmp_path, label_smoothing_factor=0.1)
    np.testing.assert_allclose(got, losses, atol=2e-4)
