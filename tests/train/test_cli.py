"""The command: errors are one line with exit status 2 and nothing written; Ctrl-C; predict, generate, doctor."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import pyfast
from pyfast.cli import app

ROOT = Path(__file__).parents[2]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def finetune(model, train_file, output_dir, *words):
    options = ["--model_name_or_path", model, "--train_file", train_file, "--output_dir", output_dir]
    return call("finetune", *options, "--stock", "--disable_tqdm", *words)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refused(result, output_dir, *words):
    """One line on stderr, status 2, nothing written."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert not Path(output_dir).exists()


LABELS = "text,label\na film,good\na food,bad\n"


@pytest.mark.parametrize(
    ("name", "text", "words", "message"),
    [
        ("t.csv", "text,mark\na,1\n", ["--task", "text-classification"], "'label'"),
        ("t.csv", LABELS, ["--label_column", "stars"], "'stars'"),
        ("t.csv", LABELS, ["--text_column", "body"], "'body'"),
        ("t.csv", "", [], "is empty"),
        ("t.csv", "text,label\n", [], "no rows"),
        ("t.jsonl", "{not json}\n", [], "could not be read as JSONL"),
        ("t.txt", LABELS, [], ".jsonl"),
        ("t.csv", "text,label\na,same\nb,same\n", [], "same"),
        ("t.csv", LABELS + "a room,\n", [], "row 3"),
        ("t.csv", LABELS, ["--packing"], "--packing"),
        ("t.csv", LABELS, ["--max_length", "1000"], "positions"),
        ("t.csv", LABELS, ["--lora_target_modules", "nothing_like_it"], "nothing_like_it"),
        ("t.csv", LABELS, ["--use_peft", "False", "--freeze", "nothing_like_it"], "nothing_like_it"),
        ("t.csv", LABELS, ["--learning_rat", "1"], "--learning_rate"),
        ("t.csv", LABELS, ["--resume_from_checkpoint", "nowhere"], "nowhere"),
        ("t.csv", LABELS, ["--resume_from_checkpoint", "True"], "no checkpoint"),
        ("t.csv", LABELS, ["--early_stopping_patience", "1"], "validation"),
        ("t.jsonl", '{"text": "a", "label": [1, 0]}\n', [], "a label is one value"),
        ("t.csv", LABELS, ["--metric_for_best_model", "bleu"], "bleu is not measured"),
        ("t.csv", LABELS, ["--fsdp", "full_shard"], "distributed"),
        ("t.csv", LABELS, ["--load_best_model_at_end", "--save_strategy", "no"], "load_best_model_at_end"),
    ],
)
def test_mistakes(models, tmp_path, write, name, text, words, message):
    refused(finetune(models["bert"], write(name, text), tmp_path / "out", *words), tmp_path / "out", message)


def test_a_reporter_that_is_not_installed(models, tmp_path, write, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    result = finetune(models["bert"], write("t.csv", LABELS), tmp_path / "out", "--report_to", "wandb")
    refused(result, tmp_path / "out", "pip install wandb")


def test_a_label_never_seen_in_training(models, tmp_path, write):
    train, validation = write("t.csv", LABELS), write("v.csv", "text,label\na film,good\na film,superb\n")
    result = finetune(models["bert"], train, tmp_path / "out", "--validation_file", validation)
    refused(result, tmp_path / "out", "superb", "never seen in training", "validation row 2")


def test_validation_rows_without_the_column(models, tmp_path, write):
    validation = write("v.csv", "body,label\na film,good\n")
    result = finetune(models["bert"], write("t.csv", LABELS), tmp_path / "out", "--validation_file", validation)
    refused(result, tmp_path / "out", "validation rows have no column 'text'", "body, label")


def test_an_output_folder_that_cannot_be_made(models, tmp_path, write):
    write("file", "")
    out = tmp_path / "file" / "out"
    refused(finetune(models["bert"], write("t.csv", LABELS), out), tmp_path / "file" / "out", "file")


def test_a_model_without_a_tokenizer(models, tmp_path, write):
    folder = tmp_path / "model"
    shutil.copytree(models["bert"], folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(finetune(folder, write("t.csv", LABELS), tmp_path / "out"), tmp_path / "out", "no tokenizer")


def test_missing_files_and_models(models, tmp_path, write):
    out = tmp_path / "out"
    refused(finetune(models["bert"], tmp_path / "none.csv", out), out, "no such file")
    refused(finetune(tmp_path / "none", write("t.csv", LABELS), out), out, "no such folder")
    refused(finetune(tmp_path, write("t.csv", LABELS), out), out, "could not be loaded")


def test_a_hub_that_cannot_be_reached(tmp_path, write, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = finetune("nobody/nothing", write("t.csv", LABELS), tmp_path / "out")
    refused(result, tmp_path / "out", "nobody/nothing", "hub could not be reached")


def test_a_gated_model(tmp_path, write, monkeypatch):
    from types import SimpleNamespace

    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoConfig

    def gated(*args, **kwargs):
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise OSError("You are trying to access a gated repo.\nMore.") from GatedRepoError("gated", response=response)

    monkeypatch.setattr(AutoConfig, "from_pretrained", gated)
    result = finetune("some/model", write("t.csv", LABELS), tmp_path / "out")
    refused(result, tmp_path / "out", "gated", "https://huggingface.co/some/model")


def test_conversations_need_a_chat_template(models, files, tmp_path):
    refused(finetune(models["gpt2"], files["chats"], tmp_path / "out"), tmp_path / "out", "no chat template")


def test_a_tokenizer_larger_than_the_embeddings(models, files, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(models["gpt2"]).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(models["gpt2"])
    tokenizer.add_tokens([f"word{i}" for i in range(500)])
    tokenizer.save_pretrained(tmp_path / "model")
    result = finetune(tmp_path / "model", files["pairs"], tmp_path / "out")
    refused(result, tmp_path / "out", "tokenizer has", "embedding 400 rows")


def test_rows_cut_and_dropped_are_reported(models, tmp_path, write):
    rows = [{"prompt": "the film", "completion": " good" * n} for n in (1, 1, 30)]
    rows.append({"prompt": "the film " * 20, "completion": " good"})
    file = write("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = finetune(models["llama"], file, tmp_path / "out", "--max_length", 16, "--max_steps", 1)
    assert result.exit_code == 0, result.output
    assert "3 rows, 2 truncated, 1 dropped" in result.stdout
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train"] == {
        "rows": 3,
        "truncated": 2,
        "dropped": 1,
    }


def test_ctrl_c_saves_a_checkpoint_that_resumes(models, files, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pyfast.cli", "finetune", "--model_name_or_path", models["llama"]]
    command += ["--train_file", files["pairs"], "--output_dir", str(out), "--stock", "--num_train_epochs", "100000"]
    command += ["--eval_strategy", "no", "--save_strategy", "no", "--dtype", "float32", "--validation_split", "0"]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            time.sleep(0.1)
            if "it/s" in (tmp_path / "log").read_text() or process.poll() is not None:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert status == 130, text
    (checkpoint,) = out.glob("checkpoint-*")
    assert f"--resume_from_checkpoint {checkpoint}" in text.splitlines()[-1]
    steps = int(checkpoint.name.split("-")[1])
    result = finetune(
        models["llama"], files["pairs"], out, "--resume_from_checkpoint", checkpoint, "--max_steps", steps + 3,
        "--dtype", "float32", "--validation_split", 0, "--save_strategy", "no",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads((out / "run.json").read_text())["train"]["steps"] == steps + 3


@pytest.fixture(scope="module")
def trained(models, files, tmp_path_factory):
    """Output folders of one short run per task."""
    folders = {}
    options = {"stock": True, "num_train_epochs": 4, "learning_rate": 5e-3, "dtype": "float32", "disable_tqdm": True}
    for rows, model in {"labels": "bert", "tags": "bert", "chats": "llama", "pairs": "gpt2"}.items():
        folder = folders[rows] = tmp_path_factory.mktemp(rows)
        pyfast.finetune(model_name_or_path=models[model], train_file=files[rows], output_dir=folder, **options)
    return folders


@pytest.mark.parametrize("stock", [["--stock"], []], ids=["stock", "pyfast"])
def test_predict_gives_what_the_evaluation_gave(trained, files, tmp_path, stock):
    out = tmp_path / "found.jsonl"
    options = ["--model_name_or_path", trained["labels"], "--dtype", "float32", *stock]
    result = call("predict", *options, "--test_file", files["labels"], "--output_file", out)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    right = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    assert f"accuracy {right:.4f}" in result.stderr
    assert all(0.5 <= row["score"] <= 1 for row in rows)
    assert right > 0.9
    result = call("predict", *options, "--text", rows[0]["text"])
    assert json.loads(result.stdout)["prediction"] == rows[0]["prediction"]


def test_predict_tags(trained, files):
    result = call("predict", "--model_name_or_path", trained["tags"], "--stock", "--text", "the film was good")
    row = json.loads(result.stdout)
    assert len(row["prediction"]) == 4
    result = call("predict", "--model_name_or_path", trained["tags"], "--stock", "--test_file", files["tags"])
    assert "f1" in result.stderr


@pytest.mark.parametrize("stock", [["--stock"], []], ids=["stock", "pyfast"])
@pytest.mark.parametrize("name", ["chats", "pairs"])
def test_generate_is_what_the_model_generates(trained, models, name, stock):
    from peft import AutoPeftModelForCausalLM

    options = ["--model_name_or_path", trained[name], "--dtype", "float32", "--max_new_tokens", 5, *stock]
    result = call("generate", *options, "--prompt", "the film is", "the really very food is")
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["completion"] for line in result.stdout.splitlines()]
    model = AutoPeftModelForCausalLM.from_pretrained(trained[name]).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained[name])
    for prompt, completion in zip(("the film is", "the really very food is"), found, strict=True):
        if name == "chats":
            prompt = f"<|user|>{prompt}</s><|assistant|>"
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=name != "chats")["input_ids"]
        tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        assert completion == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "no model"),
        (["predict", "--model_name_or_path", "LABELS"], "--text or --test_file"),
        (["predict", "--model_name_or_path", "LABELS", "--test_file", "none.csv"], "no such file"),
        (["predict", "--model_name_or_path", "./none", "--text", "a"], "no such folder"),
        (["predict", "--model_name_or_path", "PAIRS", "--text", "a"], "pyfast generate"),
        (["predict", "--model_name_or_path", "LABELS", "--text", "a", "--output_file", "a.txt"], ".jsonl"),
        (["generate", "--model_name_or_path", "PAIRS"], "--prompt or --test_file"),
        (["generate", "--model_name_or_path", "PAIRS", "--prompt", "a", "--max_new_tokens", "0"], "at least 1"),
        (["generate", "--model_name_or_path", "PAIRS", "--prompt", "a", "--temperature", "0"], "more than 0"),
        (["generate", "--model_name_or_path", "PAIRS", "--prompt", "a " * 200], "64 positions leave no room"),
        (["generate", "--model_name_or_path", "LABELS", "--prompt", "a"], "does not generate"),
    ],
)
def test_mistakes_with_a_result(trained, tmp_path, words, message):
    folders = {"LABELS": trained["labels"], "PAIRS": trained["pairs"]}
    result = call(*(folders.get(word, word) for word in words))
    refused(result, tmp_path / "out", message)


def test_doctor_names_the_backend_of_every_op():
    from pyfast import dispatch, doctor

    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert "Python" in result.stdout
    assert f"using {torch.ops.pyfast_cpu.get_isa()}" in dict(doctor.machine())["native kernels"]
    for op in dispatch.TABLE:
        assert op in result.stdout


def test_help():
    for command in ("finetune", "predict", "generate"):
        result = call(command, "--help")
        assert result.exit_code == 0
        assert "--model_name_or_path" in result.stdout
