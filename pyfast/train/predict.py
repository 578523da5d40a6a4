"""`predict` and `generate`: use what a fine-tune saved (or any model of the same task)."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import AutoConfig
from transformers.utils.peft_utils import find_adapter_config_file

from . import data, models
from .config import TASKS as TASK_NAMES
from .config import InputError, native_bf16, option
from .metrics import class_scores
from .tasks import LABEL, TAGS, TASKS, TEXT, TOKENS, TextGeneration, find_column, is_class_label
from .trainer import swap

WRITERS = {".csv": "to_csv", ".jsonl": "to_json", ".parquet": "to_parquet"}


@dataclass
class ResultArguments:
    """What `predict` and `generate` share."""

    model_name_or_path: str = option("", "The output_dir of a fine-tune, or a model: a hub id or a folder.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = option(False, "Run code that comes with the model. Off unless asked for.")
    test_file: str | None = option(None, "Rows: .jsonl, .json, .csv, .tsv or .parquet.")
    output_file: str | None = option(None, "Where the rows with their results go: .jsonl, .csv or .parquet.")
    per_device_eval_batch_size: int = option(8, "Rows per batch.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "bfloat16 where it is native, else float32.")
    use_cpu: bool = option(False, "Keep off a GPU that is there.")
    stock: bool = option(False, "Run without PyFast's kernels.")
    strict: bool = option(False, "Refuse where a part of the model could not be swapped.")

    def __post_init__(self):
        if not self.model_name_or_path:
            raise InputError("no model was given: name the output_dir of a fine-tune with --model_name_or_path")
        if self.output_file:
            file = Path(self.output_file)
            if file.suffix not in WRITERS:
                raise InputError(f"--output_file {file}: results are written as {', '.join(WRITERS)}")
            if not file.parent.is_dir():
                raise InputError(f"--output_file {file}: there is no folder {file.parent}")
        if self.per_device_eval_batch_size < 1:
            raise InputError(f"--per_device_eval_batch_size must be at least 1, got {self.per_device_eval_batch_size}")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.dtype == "auto":
            self.dtype = "bfloat16" if native_bf16(self.use_cpu) else "float32"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.use_cpu else torch.accelerator.current_accelerator()


@dataclass
class PredictArguments(ResultArguments):
    """Options of `pyfast predict`."""

    task: Literal[TASK_NAMES] | None = option(None, "The task (default: the one it was trained on).")
    text: list[str] | None = field(default=None, metadata={"help": "Texts to label, instead of --test_file."})
    text_column: str | None = option(None, "Column of the text or tokens.")
    label_column: str | None = option(None, "Column of the labels, to score the predictions.")
    max_length: int | None = option(None, "Longest row in tokens (default: as in training).")

    def __post_init__(self):
        super().__post_init__()
        if bool(self.text) == bool(self.test_file):
            raise InputError("give either --text or --test_file")


@dataclass
class GenerateArguments(ResultArguments):
    """Options of `pyfast generate`."""

    prompt: list[str] | None = field(default=None, metadata={"help": "Prompts, instead of --test_file."})
    prompt_column: str | None = option(None, "Column of the prompts.")
    max_new_tokens: int = option(128, "Longest continuation.")
    do_sample: bool = option(False, "Sample instead of taking the likeliest token.")
    temperature: float = option(1.0, "Sampling temperature.")
    top_p: float = option(1.0, "Sample from the likeliest tokens that hold this share.")
    seed: int = option(42, "Seed of the sampling.")

    def __post_init__(self):
        super().__post_init__()
        if bool(self.prompt) == bool(self.test_file):
            raise InputError("give either --prompt or --test_file")
        if self.max_new_tokens < 1:
            raise InputError(f"--max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature <= 0:
            raise InputError(
                f"--temperature must be more than 0, got {self.temperature}; leave --do_sample out instead"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p is a share in (0, 1], got {self.top_p}")


@dataclass
class Result:
    """A saved fine-tune, loaded; `record` is its run.json, empty for a model from elsewhere."""

    record: dict[str, Any]
    base: str
    adapter: str | None
    config: Any
    tokenizer: Any

    @property
    def task(self) -> str | None:
        """The task it was trained for, by its run.json or by the model's class."""
        heads = str(self.config.architectures)
        return self.record.get("task") or next((name for name, task in TASKS.items() if task.head in heads), None)


def open_result(args: ResultArguments) -> Result:
    name = args.model_name_or_path
    record_file = Path(name) / "run.json"
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    hub = models.hub_options(args)
    adapter = None
    if Path(name).is_dir() or not models.looks_local(name):
        try:
            adapter = find_adapter_config_file(name, revision=args.model_revision)
        except OSError:
            adapter = None  # the model's own loading says what is wrong
    base = json.loads(Path(adapter).read_text())["base_model_name_or_path"] if adapter else name
    base_hub = {"trust_remote_code": args.trust_remote_code} if adapter else hub
    words = record.get("task") == "token-classification" or getattr(args, "task", None) == "token-classification"
    config = models.load(AutoConfig, base, **base_hub)
    return Result(record, base, name if adapter else None, config, models.load_tokenizer(name, words, **hub))


def load_result(args: ResultArguments, result: Result, task_class: type) -> torch.nn.Module:
    """The model with its adapter, patched unless --stock, in eval mode on its device."""
    labels = result.record.get("labels")
    if labels:
        result.config.id2label = dict(enumerate(labels))
        result.config.label2id = {name: i for i, name in enumerate(labels)}
    result.config.pad_token_id = result.tokenizer.pad_token_id
    hub = {"trust_remote_code": args.trust_remote_code}
    if not result.adapter:
        hub["revision"] = args.model_revision
    dtype = getattr(torch, args.dtype)
    options = {"dtype": dtype, "config": result.config, "use_safetensors": True, **hub}
    model = models.load(task_class.auto_model, result.base, **options)
    if result.adapter:
        model = PeftModel.from_pretrained(model, result.adapter)
    model = model.eval().to(args.device)
    swap(model, args)
    return model


def autocast(args: ResultArguments):
    """bf16 products beside fp32 heads and adapters, as in training."""
    return torch.autocast(args.device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()


def write(rows: list[dict], output_file: str | None) -> None:
    if output_file is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, default=str))
    else:
        getattr(Dataset.from_list(rows), WRITERS[Path(output_file).suffix])(output_file)
        print(f"{len(rows):,} rows written to {output_file}", file=sys.stderr)


def move(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def predict(args: PredictArguments) -> list[dict]:
    """Label the rows of --test_file or --text; the rows with `prediction` and `score` are written and returned.

    Where the rows have labels, the predictions are scored too (on stderr).
    """
    result = open_result(args)
    trained_on = result.record.get("columns", {})
    name = args.task or result.task
    if name is None or name == TextGeneration.name:
        raise InputError(f"{args.model_name_or_path} does not label texts: use pyfast generate, or give --task")
    task_class = TASKS[name]
    words = name == "token-classification"
    if args.text:
        rows = Dataset.from_list([{"tokens": t.split()} if words else {"text": t} for t in args.text])
        text = "tokens" if words else "text"
    else:
        rows = data.read_file(args.test_file)
        usual = (trained_on.get("text"), *(TOKENS if words else TEXT))
        text = find_column(rows.column_names, args.text_column, usual, "text_column", "the text")
    columns = rows.column_names
    usual = (trained_on.get("label"), *(TAGS if words else LABEL))
    label = args.label_column or next((name for name in usual if name in columns), None)
    if args.label_column:
        find_column(columns, args.label_column, (), "label_column", "the label")
    names = result.record.get("labels") or list(result.config.id2label.values())
    length = models.longest_row(result.config, result.tokenizer, args.max_length or result.record.get("max_length"))
    class_labels = label is not None and is_class_label(rows, label)
    task = task_class(result.tokenizer, length, text, label, names, class_labels)
    model = load_result(args, result, task_class)

    predicted, truths, probabilities = [], [], []
    for start in range(0, len(rows), args.per_device_eval_batch_size):
        batch = [rows[i] for i in range(start, min(start + args.per_device_eval_batch_size, len(rows)))]
        features = [task.encode_input(row)[0] for row in batch]
        word_ids = [f.pop("word_ids", None) for f in features]
        inputs = result.tokenizer.pad(features, return_tensors="pt")
        with autocast(args):
            logits = model(**move(inputs, args.device)).logits
        scores = logits.float().softmax(-1).cpu()
        for row, score, ids in zip(batch, scores, word_ids, strict=True):
            if words:
                first = [i for i, word in enumerate(ids) if word is not None and (i == 0 or ids[i - 1] != word)]
                score = score[first]
                found = {"prediction": [names[i] for i in score.argmax(-1)]}
                truth = [task.label_id(tag, names) for tag in row[label][: len(first)]] if label else []
            else:
                score = score[None]
                best = int(score.argmax())
                found = {"prediction": names[best], "score": round(float(score[0, best]), 6)}
                truth = [task.label_id(row[label], names)] if label else []
            predicted.append({**row, **found})
            truths += truth
            probabilities.append(score)
    if label is not None:
        found = class_scores(torch.tensor(truths).numpy(), torch.cat(probabilities).numpy(), names)
        Console(stderr=True).print(", ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
    write(predicted, args.output_file)
    return predicted


@torch.no_grad()
def generate(args: GenerateArguments) -> list[dict]:
    """Continue the prompts of --test_file or --prompt; the rows with `completion` are written and returned."""
    result = open_result(args)
    if result.task not in (None, TextGeneration.name):
        raise InputError(f"{args.model_name_or_path} does not generate text: use pyfast predict")
    trained_on = result.record.get("columns", {})
    if args.prompt:
        column, rows = "prompt", Dataset.from_list([{"prompt": prompt} for prompt in args.prompt])
    else:
        rows = data.read_file(args.test_file)
        usual = (trained_on.get("prompt"), "prompt", "question", "instruction", "text")
        column = find_column(rows.column_names, args.prompt_column, usual, "prompt_column", "the prompt")
    tokenizer = result.tokenizer
    tokenizer.padding_side = "left"  # a continuation starts at the row's end
    task = TextGeneration(tokenizer, models.longest_row(result.config, tokenizer, None))
    task.chat = result.record.get("chat", False)
    if None in rows[column]:
        raise InputError(f"prompt {rows[column].index(None) + 1} is missing: the column {column!r} holds no value")
    prompts = [task.prompt_ids(row[column]) for row in rows]
    positions = getattr(result.config.get_text_config(), "max_position_embeddings", None)
    for i, ids in enumerate(prompts):
        if not ids:
            raise InputError(f"prompt {i + 1} is empty: there is nothing to continue")
        if positions and len(ids) >= positions:
            raise InputError(f"prompt {i + 1} has {len(ids)} tokens: the model's {positions} positions leave no room")
    model = load_result(args, result, TextGeneration)
    torch.manual_seed(args.seed)
    options = {"do_sample": args.do_sample}
    options["pad_token_id"] = tokenizer.pad_token_id
    if args.do_sample:
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    if task.end is not None:
        options["eos_token_id"] = task.end
    results = []
    for start in range(0, len(rows), args.per_device_eval_batch_size):
        batch = [rows[i] for i in range(start, min(start + args.per_device_eval_batch_size, len(rows)))]
        inputs = tokenizer.pad({"input_ids": prompts[start : start + len(batch)]}, return_tensors="pt")
        room = positions - inputs["input_ids"].shape[1] if positions else args.max_new_tokens
        options["max_new_tokens"] = min(args.max_new_tokens, room)
        with autocast(args):
            tokens = model.generate(**move(inputs, args.device), **options)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        results += [{**row, "completion": text} for row, text in zip(batch, texts, strict=True)]
    write(results, args.output_file)
    return results
