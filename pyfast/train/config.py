"""The options of a fine-tune, under the ecosystem's names, from a command line, keyword arguments or a YAML file."""

import dataclasses
import difflib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

TASKS = ("text-generation", "text-classification", "token-classification")


class InputError(ValueError):
    """A mistake in what the user gave; its message is one clear line."""


def option(default: Any, help: str, **kwargs) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str) -> int:
    """ "8GB" -> 8,000,000,000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text.strip())
    if found is None or found[2] not in UNITS:
        raise InputError(f"--memory_budget {text!r} is not a size: write a number and one of {', '.join(UNITS)}")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass
class DataArguments:
    """What to train on; shared by `finetune`, `predict` and `generate`."""

    dataset_name: str | None = option(None, "Dataset on the hub, or a folder that datasets.load_dataset reads.")
    dataset_config_name: str | None = option(None, "Configuration of --dataset_name.")
    train_file: str | None = option(None, "Training rows: .jsonl, .json, .csv, .tsv or .parquet.")
    validation_file: str | None = option(None, "Validation rows, read as --train_file.")
    test_file: str | None = option(None, "Test rows, evaluated once after training.")
    validation_split: float = option(0.1, "Share of the training rows held out where no validation rows are given.")
    max_train_samples: int | None = option(None, "Use only the first N training rows.")
    max_eval_samples: int | None = option(None, "Use only the first N validation and test rows.")
    text_column: str | None = option(None, "Column of the text or tokens (default: text, sentence, tokens...).")
    label_column: str | None = option(None, "Column of the label or tags (default: label, labels, ner_tags...).")
    prompt_column: str | None = option(None, "Column of the prompt (default: prompt, question, instruction).")
    completion_column: str | None = option(None, "Column of the completion (default: completion, answer...).")
    max_length: int | None = option(None, "Longest row in tokens; longer ones are cut (default: the model's, <= 1024).")


@dataclass
class PyFastArguments(DataArguments):
    """PyFast's own options; TrainingArguments' follow them."""

    model_name_or_path: str = option("", "Model: a hub id or a folder.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = option(False, "Run code that comes with the model. Off unless asked for.")
    task: Literal[TASKS] | None = option(None, "The task (default: read from the columns).", choices=TASKS)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "bfloat16 where a GPU or AMX computes it natively, else float32."
    )
    use_peft: bool = option(True, "Train LoRA adapters; False trains every weight.")
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "The adapters' scale is lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout on the adapters' input.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get adapters (default: every linear layer)."}
    )
    freeze: str | None = option(None, "Regular expression: parameters whose name it finds are not trained.")
    packing: bool = option(False, "Join a batch's rows without padding; no row sees another.")
    memory_budget: str | None = option(
        None, "Recompute as few layers in the backward as keep training within this, such as 8GB."
    )
    early_stopping_patience: int | None = option(None, "Stop after N evaluations without an improvement.")
    stock: bool = option(False, "Run without PyFast's kernels, to compare.")
    strict: bool = option(False, "Refuse to train where a part of the model could not be swapped.")
    keep_logits: bool = option(False, "Return logits in training too, where the fused loss would leave them None.")
    merge: bool = option(False, "Also save the model with the adapters merged, under OUTPUT_DIR/merged.")


@dataclass
class FinetuneArguments(TrainingArguments, PyFastArguments):
    """PyFast's options and all of TrainingArguments', with the defaults that a short fine-tune wants."""

    output_dir: str | None = option("pyfast_output", "Where everything is written.")
    learning_rate: float | None = option(None, "Peak learning rate (default: 2e-4 for LoRA, 2e-5 for all weights).")
    logging_steps: float = option(10, "Steps between two points of the loss curve.")
    eval_strategy: str = option("epoch", "When to evaluate during training: no, steps or epoch.")
    save_strategy: str = option("epoch", "When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = option(2, "Keep only the newest N checkpoints.")
    include_num_input_tokens_seen: str = option("non_padding", "Which tokens count in tokens/s.")
    disable_tqdm: bool | None = option(False, "No progress bar.")
    remove_unused_columns: bool = option(False, "The rows hold only what the model takes.")

    def __post_init__(self):
        if not self.model_name_or_path:
            raise InputError("no model was given: name a hub id or a folder with --model_name_or_path")
        if not (self.dataset_name or self.train_file):
            raise InputError("no data were given: name them with --train_file or --dataset_name")
        if self.dataset_name and self.train_file:
            raise InputError("--dataset_name and --train_file are two sources for the same rows: give one of them")
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"--task {self.task!r} is not known: choose one of {', '.join(TASKS)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"--dtype {self.dtype!r} is not known: choose auto, float32 or bfloat16")
        if self.lora_r < 1:
            raise InputError(f"--lora_r must be at least 1, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is a share in [0, 1), got {self.lora_dropout}")
        if self.learning_rate is not None and self.learning_rate < 0:
            raise InputError(f"--learning_rate must not be negative, got {self.learning_rate}")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
            if self.gradient_checkpointing:
                raise InputError(
                    "--memory_budget chooses the layers, --gradient_checkpointing takes all: give one of them"
                )
        if self.merge and not self.use_peft:
            raise InputError("--merge folds adapters into the weights, and --use_peft False trains without adapters")
        if not 0 <= self.validation_split < 1:
            raise InputError(f"--validation_split is a share in [0, 1), got {self.validation_split}")
        counts = ("max_length", "max_train_samples", "max_eval_samples", "early_stopping_patience")
        for name in (*counts, "per_device_train_batch_size", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        try:
            re.compile(self.freeze or "")
        except re.error as error:
            raise InputError(f"--freeze {self.freeze!r} is not a regular expression: {error}") from None
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.bf16 or (not self.fp16 and native_bf16(self.use_cpu)) else "float32"
        # Products run in bf16 under autocast, so that weights which are trained (adapters, heads) can stay in fp32.
        self.bf16 = self.bf16 or self.dtype == "bfloat16"
        if self.learning_rate is None:
            self.learning_rate = 2e-4 if self.use_peft else 2e-5
        if self.early_stopping_patience:
            if self.eval_strategy == "no":
                raise InputError("--early_stopping_patience counts evaluations: --eval_strategy must not be no")
            self.load_best_model_at_end = True
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.save_steps
        super().__post_init__()
        for name in self.report_to:
            if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
                raise InputError(f"--report_to {name} needs the package {name}: pip install {name}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def native_bf16(use_cpu: bool) -> bool:
    """Whether this machine multiplies bf16 matrices in hardware: AMX on a CPU, Ampere and later on a GPU."""
    if use_cpu:
        return torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line, without the 200 lines of usage."""

    def error(self, message: str):
        raise InputError(message)


def to_argv(options: dict[str, Any]) -> list[str]:
    """Options as command-line words, so that every source goes through one parser (YAML reads 5e-4 as a string)."""
    argv = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, (list, tuple, set)):
            argv += [f"--{name}", *map(str, value)]
        else:
            value = value.value if isinstance(value, Enum) else json.dumps(value) if isinstance(value, dict) else value
            argv.append(f"--{name}={value}")
    return argv


def read_config(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--config {path}: there is no such file")
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise InputError(f"--config {path} must hold `option: value` lines, got a {type(options).__name__}")
    return options


def parse_arguments(arguments_class: type, argv: list[str]) -> Any:
    """`arguments_class` from command-line words; `--config FILE.yaml` is read first, the other words override it.

    Raises InputError, one line, for an option that does not exist (with the nearest one that does) or a bad value.
    """
    argv = list(argv)
    for i, word in enumerate(argv):
        if word.split("=")[0] == "--config":
            path, used = (word.split("=", 1)[1], 1) if "=" in word else (argv[i + 1] if i + 1 < len(argv) else "", 2)
            argv = to_argv(read_config(path)) + argv[:i] + argv[i + used :]
            break
    description = (
        "Every option can be written --like_this or --like-this; --config FILE.yaml reads options from a file."
    )
    parser = Parser(arguments_class, allow_abbrev=False, usage="pyfast COMMAND [OPTIONS]", description=description)
    names = {f.name for f in dataclasses.fields(arguments_class)} | {"config", "help"}
    for word in argv:
        name = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and name not in names and name.removeprefix("no_") not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise InputError(f"there is no option --{name}" + (f"; did you mean --{near[0]}?" if near else ""))
    try:
        arguments, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from None
    if rest:
        raise InputError(f"{' '.join(rest)!r} belongs to no option: options are written --name value")
    return arguments
