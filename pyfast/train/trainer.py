"""`finetune`: from options to a trained model with its report. transformers' Trainer trains."""

import json
import logging
import platform
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, EarlyStoppingCallback, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from . import data, models
from .callbacks import Clock, Progress, SaveOnInterrupt, peak_memory_mb
from .config import FinetuneArguments, InputError, parse_arguments, parse_bytes, to_argv
from .memory import keep_to_budget
from .metrics import loss_figure, save_figure
from .tasks import TASKS, TextGeneration, detect_task

VERSIONS = ("pyfast-kernels", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; the message says where the checkpoint lies."""


@dataclass
class FinetuneResult:
    """What `finetune` gives back; `run` is what run.json holds."""

    output_dir: Path
    model: torch.nn.Module = field(repr=False)
    tokenizer: transformers.PreTrainedTokenizerBase = field(repr=False)
    before: dict[str, float]
    after: dict[str, float]
    test: dict[str, float]
    report: Any  # pyfast.PatchReport, or None for a stock run
    run: dict[str, Any] = field(repr=False)


def finetune(config: str | Path | None = None, **options) -> FinetuneResult:
    """Fine-tune a model: the same options as `pyfast finetune`, as keyword arguments.

    config: a YAML file of options; keyword arguments override it. See FinetuneArguments for all of them.
    Raises InputError (a ValueError), before anything is written, for options or data that cannot work.
    """
    argv = to_argv({"config": config, **options})
    return run(parse_arguments(FinetuneArguments, argv))


def checkpoint_to_resume(args: FinetuneArguments) -> str | None:
    """The folder that --resume_from_checkpoint means: a path, or the last checkpoint of output_dir for `True`."""
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() in ("true", "last"):
        found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if found is None:
            raise InputError(f"--resume_from_checkpoint: {args.output_dir} holds no checkpoint")
        return found
    if not (Path(asked) / "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {asked} is not a checkpoint: it has no trainer_state.json")
    return asked


def swap(model: torch.nn.Module, args, keep_logits: bool = False):
    """PyFast's kernels into the model, and the report; None for a stock run."""
    if args.stock:
        return None
    import pyfast

    try:
        report = pyfast.patch(model, strict=args.strict, keep_logits=keep_logits)
    except (ValueError, RuntimeError) as error:
        if not args.strict:
            raise
        raise InputError(f"--strict: {' '.join(str(error).split())}") from None
    return report


class MetricsTrainer(Trainer):
    """Trainer whose evaluation results come back under plain names."""

    def scores(self, rows, metrics, prefix: str = "eval") -> dict[str, float]:
        found = self.evaluate(rows, metric_key_prefix=prefix)
        return {name: found[f"{prefix}_{name}"] for name in metrics.columns if f"{prefix}_{name}" in found}


def run(args: FinetuneArguments, console: Console | None = None) -> FinetuneResult:
    """One fine-tune. Nothing is written before model, data and options are known to go together."""
    main = args.process_index == 0
    console = console or Console(quiet=not main, soft_wrap=True)
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file")
    checkpoint = checkpoint_to_resume(args)
    set_seed(args.seed)

    # Data and model
    splits = data.load_splits(args)
    task_class = TASKS[args.task or detect_task(args, splits.train.column_names)]
    if args.packing and task_class is not TextGeneration:
        raise InputError(
            f"--packing joins rows for text-generation; {task_class.name} pads each batch to its longest row "
            "(--train_sampling_strategy group_by_length keeps the padding small)"
        )
    hub = models.hub_options(args)
    config = models.load(AutoConfig, args.model_name_or_path, **hub)
    words = task_class.name == "token-classification"
    tokenizer = models.load_tokenizer(args.model_name_or_path, words, **hub)
    max_length = models.longest_row(config, tokenizer, args.max_length)
    task = task_class.from_rows(args, tokenizer, max_length, splits.train)
    encoded = {name: data.encode(rows, task, name) for name, rows in splits.items()}
    if "validation" not in encoded:
        encoded["train"], held_out = data.hold_out(encoded["train"], args.validation_split, args.seed)
        if held_out is not None:
            encoded["validation"] = held_out
            splits.notes.append(f"{len(held_out.rows)} training rows held out for validation (--validation_split)")
    if "validation" not in encoded:
        if args.early_stopping_patience:
            raise InputError("--early_stopping_patience needs validation rows: give --validation_file")
        args.eval_strategy = transformers.IntervalStrategy.NO
        args.load_best_model_at_end = False
    if hasattr(task, "labels"):
        if task.head in str(config.architectures) and config.num_labels != len(task.labels):
            splits.notes.append(
                f"the model's head for {config.num_labels} labels is replaced: {len(task.labels)} labels"
            )
        config.num_labels = len(task.labels)
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    model = models.load_model(args, task, config)
    if task_class is TextGeneration:
        data.check_causal(model)
    if args.use_peft:
        model = models.add_adapters(model, args, task)
    if args.freeze:
        models.freeze(model, args.freeze)
    splits.notes += models.place(model, args)
    report = swap(model, args, args.keep_logits)
    if args.packing:
        args.include_num_input_tokens_seen = "all"  # a packed batch has no padding
        data.check_packing(model, task.collator())

    # What will run
    trained, total = count_parameters(model)
    console.print(f"{task.name}: {args.model_name_or_path}, {args.dtype}, {trained:,} of {total:,} parameters trained")
    for name, rows in encoded.items():
        console.print(f"{name}: {rows}" + (f" (to {max_length} tokens)" if rows.truncated else ""))
    for note in splits.notes:
        console.print(note)
    if report is not None:
        console.print(str(report), markup=False, highlight=False)

    # Train
    clock, interrupt, metrics = Clock(), SaveOnInterrupt(), task.metrics()
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in metrics.columns:
        raise InputError(f"--metric_for_best_model {best} is not measured: choose from {', '.join(metrics.columns)}")
    callbacks = [clock, interrupt]
    if args.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    validation = encoded["validation"].rows if "validation" in encoded else None
    try:
        trainer = MetricsTrainer(
            model=model,
            args=args,
            train_dataset=encoded["train"].rows,
            eval_dataset=validation,
            data_collator=task.collator(),
            processing_class=tokenizer,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.preprocess,
            callbacks=callbacks,
        )
    except (ValueError, ImportError, OSError) as error:  # options that do not go together, a folder that cannot be made
        raise InputError(" ".join(str(error).split())) from None
    trainer.label_names = ["labels"]
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    if not args.disable_tqdm:
        trainer.add_callback(Progress(clock))

    before = trainer.scores(validation, metrics) if validation is not None else {}
    if args.memory_budget is not None:
        console.print(keep_to_budget(trainer, parse_bytes(args.memory_budget)))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if interrupt.interrupted:
        saved = get_last_checkpoint(args.output_dir)
        raise Interrupted(f"stopped at step {trainer.state.global_step}; go on with --resume_from_checkpoint {saved}")
    peak = peak_memory_mb()
    log_history = list(trainer.state.log_history)
    after = trainer.scores(validation, metrics) if validation is not None else {}
    test = trainer.scores(encoded["test"].rows, metrics, "test") if "test" in encoded else {}

    # Save and report
    trainer.save_model(args.output_dir)
    record = {
        "task": task.name,
        "model_name_or_path": args.model_name_or_path,
        "max_length": max_length,
        "chat": getattr(task, "chat", False),
        "labels": getattr(task, "labels", None),
        "columns": task.columns,
        "seed": args.seed,
        "dtype": args.dtype,
        "data": {"hashes": splits.hashes, "notes": splits.notes}
        | {
            name: {"rows": len(rows.rows), "truncated": rows.truncated, "dropped": rows.dropped}
            for name, rows in encoded.items()
        },
        "metrics": {"before": before, "after": after, "test": test},
        "train": {
            "steps": trainer.state.global_step,
            "seconds": round(clock.seconds, 3),
            "tokens": clock.tokens,
            "tokens_per_second": round(clock.tokens_per_second, 1),
            "peak_memory_mb": round(peak, 1),
            "trained_parameters": trained,
            "parameters": total,
        },
        "patch": describe(report),
        "versions": versions(),
        "arguments": args.to_dict(),
        "loss": [[entry["step"], entry["loss"]] for entry in log_history if "loss" in entry],
        "evaluations": [entry for entry in log_history if "eval_loss" in entry],
    }
    if main:
        save_figure(loss_figure(log_history), output_dir / "loss.png")
        save_figure(metrics.roc_figure(), output_dir / "roc.png")
        (output_dir / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        print_results(console, record, metrics.columns, output_dir)
    if args.merge:
        merge(trainer, tokenizer, output_dir / "merged", report)
        console.print(f"merged model: {output_dir / 'merged'}")
    return FinetuneResult(output_dir, model, tokenizer, before, after, test, report, record)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def merge(trainer: Trainer, tokenizer, folder: Path, report) -> None:
    """Save the model with its adapters folded into the weights."""
    import pyfast

    model = trainer.accelerator.unwrap_model(trainer.model)
    if report is not None:
        pyfast.unpatch(model)
    merged = model.merge_and_unload()
    if trainer.is_world_process_zero():
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def describe(report) -> dict | None:
    """The patch report for run.json."""
    if report is None:
        return None
    return {"swapped": list(map(list, report.swapped)), "skipped": list(map(list, report.skipped))}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def print_results(console: Console, record: dict, columns: tuple[str, ...], output_dir: Path) -> None:
    train, scores = record["train"], {name: found for name, found in record["metrics"].items() if found}
    if scores:
        table = Table("metric")
        for name in scores:
            table.add_column(name if name == "test" else f"{name} training", justify="right")
        for metric in columns:
            if any(metric in found for found in scores.values()):
                table.add_row(metric, *(f"{f[metric]:.4f}" if metric in f else "-" for f in scores.values()))
        console.print(table)
    console.print(
        f"{train['steps']:,} steps, {train['tokens']:,} tokens in {train['seconds']:.1f} s: "
        f"{train['tokens_per_second']:,.0f} tokens/s, peak memory {train['peak_memory_mb']:,.0f} MB"
    )
    pictures = ", ".join(name for name in ("loss.png", "roc.png") if (output_dir / name).exists())
    console.print(f"saved in {output_dir}: the model, run.json, {pictures}")


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and warnings out of a command's output."""
    import datasets

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="(transformers|peft)")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "datasets", "httpx", "accelerate"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
