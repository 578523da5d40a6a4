"""Whole runs on small models: what they write, that it can be used elsewhere, that they can be stopped and resumed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import pyfast
from pyfast.train import InputError
from pyfast.train.models import place

RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "dtype": "float32", "seed": 1}


def finetune(model, train_file, output_dir, **options):
    return pyfast.finetune(model_name_or_path=model, train_file=train_file, output_dir=output_dir, **{**RUN, **options})


@pytest.fixture(params=[True, False], ids=["stock", "pyfast"])
def stock(request):
    return request.param


@pytest.mark.parametrize(
    ("rows", "model", "task", "metrics"),
    [
        ("labels", "bert", "text-classification", {"accuracy", "precision", "recall", "f1", "roc_auc"}),
        ("labels", "roberta", "text-classification", {"accuracy", "f1"}),
        ("labels", "llama", "text-classification", {"accuracy"}),
        ("tags", "bert", "token-classification", {"accuracy", "precision", "recall", "f1"}),
        ("pairs", "llama", "text-generation", {"accuracy", "perplexity"}),
        ("pairs", "gpt2", "text-generation", {"perplexity"}),
        ("chats", "llama", "text-generation", {"perplexity"}),
    ],
)
def test_every_task_learns_and_reports(models, files, tmp_path, rows, model, task, metrics, stock):
    result = finetune(models[model], files[rows], tmp_path, stock=stock, learning_rate=3e-3)
    assert result.run["task"] == task
    assert {"loss", *metrics} <= set(result.before) == set(result.after)
    assert result.after["loss"] < result.before["loss"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["metrics"]["after"] == result.after
    assert record["seed"] == 1
    assert record["data"]["hashes"]["train"].startswith("sha256:")
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["train"]["tokens_per_second"] > 0
    assert (record["patch"] is None) == stock
    assert stock or record["patch"]["swapped"]
    for picture in ["loss.png"] + ["roc.png"] * (task != "text-generation"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_the_adapter_is_stock_peft_and_the_merged_model_is_the_same(models, files, tmp_path, stock):
    result = finetune(models["bert"], files["labels"], tmp_path, stock=stock, learning_rate=1e-2, merge=True)
    base = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=2)
    reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "negative", 1: "positive"}
    inputs = AutoTokenizer.from_pretrained(tmp_path)(["the film was good", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = reloaded(**inputs).logits, merged(**inputs).logits
        untrained = AutoModelForSequenceClassification.from_pretrained(models["bert"]).eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - untrained).abs().max() > 1e-2
    del result


def test_merged_generation_model(models, files, tmp_path, stock):
    finetune(models["llama"], files["pairs"], tmp_path, stock=stock, learning_rate=1e-2, merge=True)
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[2, 10, 20, 30]])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def loss_curve(result):
    return [loss for _, loss in result.run["loss"]]


@pytest.mark.parametrize(("rows", "model"), [("labels", "bert"), ("pairs", "llama"), ("pairs", "gpt2")])
def test_stock_and_pyfast_train_alike(models, files, tmp_path, rows, model):
    options = {"logging_steps": 1, "learning_rate": 1e-3}
    curves = [
        loss_curve(finetune(models[model], files[rows], tmp_path / str(stock), stock=stock, **options))
        for stock in (True, False)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_packing_changes_no_loss(models, files, tmp_path, model, stock):
    options = {"logging_steps": 1, "learning_rate": 1e-3, "stock": stock}
    padded = finetune(models[model], files["pairs"], tmp_path / "padded", **options)
    packed = finetune(models[model], files["pairs"], tmp_path / "packed", packing=True, **options)
    assert loss_curve(packed) == pytest.approx(loss_curve(padded), abs=1e-4)
    assert packed.after["loss"] == pytest.approx(padded.after["loss"], abs=1e-4)


def test_resuming_gives_the_run_that_was_never_stopped(models, files, tmp_path, stock):
    options = {"stock": stock, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 9}
    finetune(models["llama"], files["pairs"], tmp_path / "whole", **options)
    resumed = finetune(
        models["llama"],
        files["pairs"],
        tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-5",
        **options,
    )
    assert resumed.run["train"]["steps"] > 5
    whole, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], rtol=0, atol=0, msg=name)


def test_resume_finds_the_last_checkpoint(models, files, tmp_path):
    first = finetune(models["llama"], files["pairs"], tmp_path, stock=True, num_train_epochs=1)
    second = finetune(models["llama"], files["pairs"], tmp_path, stock=True, resume_from_checkpoint=True)
    assert second.run["train"]["steps"] == 2 * first.run["train"]["steps"]
    assert second.run["train"]["tokens"] == first.run["train"]["tokens"]  # only what this run trained on


def test_early_stopping_keeps_the_best(models, files, tmp_path):
    """At this learning rate the loss never comes back to where the first epoch left it."""
    options = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "num_train_epochs": 20}
    result = finetune(models["bert"], files["labels"], tmp_path, stock=True, early_stopping_patience=1, **options)
    evaluations = [entry["eval_loss"] for entry in result.run["evaluations"]]
    assert len(evaluations) < 20
    assert evaluations[-1] >= min(evaluations)
    assert result.after["loss"] == pytest.approx(min(evaluations), rel=1e-5)


def test_full_fine_tuning_and_freeze(models, files, tmp_path, stock):
    result = finetune(
        models["bert"],
        files["labels"],
        tmp_path,
        stock=stock,
        use_peft=False,
        freeze=r"embeddings|layer\.0\.",
        merge=False,
    )
    before = load_file(Path(models["bert"]) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "embeddings" in name or "layer.0." in name}
    assert result.run["train"]["trained_parameters"] < result.run["train"]["parameters"]


def test_lora_on_named_modules(models, files, tmp_path):
    finetune(
        models["llama"], files["pairs"], tmp_path, stock=True, lora_target_modules=["q_proj"], lora_r=4, max_steps=1
    )
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all("q_proj" in name for name in adapter)
    assert {min(tensor.shape) for tensor in adapter.values()} == {4}


def test_bf16(models, files, tmp_path, stock):
    result = finetune(models["bert"], files["labels"], tmp_path, stock=stock, dtype="bfloat16", learning_rate=1e-2)
    assert result.after["loss"] < result.before["loss"]
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in result.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_tokenizer_without_a_pad_token(models, files, tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(models["gpt2"]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(models["gpt2"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    result = finetune(str(folder), files["pairs"], tmp_path / "out", stock=True)
    assert result.tokenizer.pad_token == result.tokenizer.eos_token
    assert result.after["loss"] < result.before["loss"]


def test_a_test_file_is_scored(models, files, tmp_path):
    result = finetune(models["bert"], files["labels"], tmp_path, stock=True, test_file=files["labels_test"])
    assert result.test["accuracy"] in (0.0, 0.5, 1.0)


def test_tensorboard(models, files, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    finetune(models["bert"], files["labels"], tmp_path / "out", stock=True, max_steps=2, report_to="tensorboard")
    assert list((tmp_path / "board").rglob("events.out.tfevents*"))


def test_an_unknown_family_trains_with_a_report_and_strict_refuses(files, models, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path / "opt"
    config = OPTConfig(
        vocab_size=400,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(folder)
    result = finetune(str(folder), files["pairs"], tmp_path / "out", learning_rate=1e-2)
    assert result.after["loss"] < result.before["loss"]
    assert result.run["patch"]["skipped"]
    assert "LoraModel" not in repr(result)  # what a notebook shows: the scores, not the model
    with pytest.raises(InputError, match="--strict"):
        finetune(str(folder), files["pairs"], tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("gpus, processes", [(0, 1), (1, 1), (3, 1), (1, 2)])
def test_a_model_is_patched_where_it_is_trained(gpus, processes):
    """The report names the kernels of that device; a machine's further GPUs are left to processes of their own."""
    args = SimpleNamespace(n_gpu=gpus, _n_gpu=gpus, world_size=processes, device=torch.device("meta"))
    model = torch.nn.Linear(2, 2)
    notes = place(model, args)
    assert model.weight.device.type == ("meta" if processes == 1 else "cpu")
    assert args._n_gpu == min(gpus, 1)
    assert [note.split(":")[0] for note in notes] == (["one of 3 GPUs is used"] if gpus == 3 else [])
