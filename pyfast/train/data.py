"""Rows: read from files or the hub, checked, tokenized by the task, and put together into batches."""

import hashlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from datasets import Dataset

from .config import DataArguments, InputError

# One row per file type: the builder of datasets.load_dataset and its options. A cell is a string, "NA" and "None" too.
# TSV has no quoting (IANA text/tab-separated-values).
READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"na_filter": False}),
    ".tsv": ("csv", {"na_filter": False, "delimiter": "\t", "quoting": 3}),
    ".parquet": ("parquet", {}),
}
# The values of a `split` column, which divides one file.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


@dataclass
class Splits:
    """The rows of a run, the hash of their source, and what a person should know about how they were divided."""

    train: Dataset | None = None
    validation: Dataset | None = None
    test: Dataset | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def items(self) -> list[tuple[str, Dataset]]:
        return [(n, d) for n in ("train", "validation", "test") if (d := getattr(self, n)) is not None]


def cause(error: BaseException) -> str:
    """The first line of the exception that another one wraps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_file(path: str) -> Dataset:
    """One file as a Dataset. Raises InputError where it is missing, empty, of another type or cannot be read."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: there is no such file")
    if file.suffix not in READERS:
        raise InputError(f"{path}: rows are read from {', '.join(READERS)}, not from {file.suffix or 'a bare name'!r}")
    if not file.stat().st_size:
        raise InputError(f"{path} is empty")
    builder, options = READERS[file.suffix]
    try:
        rows = datasets.load_dataset(builder, data_files=str(file), split="train", **options)
    except Exception as error:  # each builder raises its own
        if "corresponds to no data" in str(error):
            raise InputError(f"{path} has no rows") from None
        raise InputError(f"{path} could not be read as {file.suffix[1:].upper()}: {cause(error)}") from None
    if not len(rows):
        raise InputError(f"{path} has no rows")
    return rows


def file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def read_hub(args: DataArguments) -> Splits:
    try:
        found = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    except ValueError as error:  # several configurations, or one that does not exist
        raise InputError(f"--dataset_name {args.dataset_name}: {' '.join(str(error).split())}") from None
    except Exception as error:
        raise InputError(
            f"--dataset_name {args.dataset_name} could not be loaded ({cause(error)}): check the name and the network, "
            "or give --train_file"
        ) from None
    splits = Splits()
    for name, aliases in SPLIT_NAMES.items():
        for alias in aliases:
            if alias in found:
                setattr(splits, name, found[alias])
                splits.hashes[name] = f"fingerprint:{found[alias]._fingerprint}"
                break
    if splits.train is None:
        raise InputError(f"--dataset_name {args.dataset_name} has no split train: it has {', '.join(found)}")
    return splits


def divide(splits: Splits) -> None:
    """Divide the training file by its `split` column, where it has one with known names."""
    if splits.validation or splits.test or "split" not in splits.train.column_names:
        return
    names = [str(value).strip().lower() for value in splits.train["split"]]
    if not set(names) <= {alias for aliases in SPLIT_NAMES.values() for alias in aliases} or len(set(names)) < 2:
        return
    rows = splits.train
    for split, aliases in SPLIT_NAMES.items():
        index = [i for i, name in enumerate(names) if name in aliases]
        setattr(splits, split, rows.select(index) if index else None)
    if splits.train is None:
        raise InputError("the column split names no row train")
    splits.notes.append("divided by the column split")


def load_splits(args: DataArguments) -> Splits:
    """Every split that the options name."""
    if args.dataset_name:
        splits = read_hub(args)
    else:
        splits = Splits()
        for name in ("train", "validation", "test"):
            path = getattr(args, f"{name}_file")
            if path:
                setattr(splits, name, read_file(path))
                splits.hashes[name] = file_hash(path)
        divide(splits)
    if args.max_train_samples:
        splits.train = splits.train.select(range(min(args.max_train_samples, len(splits.train))))
    if args.max_eval_samples:
        for name in ("validation", "test"):
            if (rows := getattr(splits, name)) is not None:
                setattr(splits, name, rows.select(range(min(args.max_eval_samples, len(rows)))))
    return splits


@dataclass
class Encoded:
    """Tokenized rows with what was cut and what was left out."""

    rows: Dataset
    truncated: int
    dropped: int

    def __str__(self) -> str:
        text = f"{len(self.rows):,} rows"
        if self.truncated:
            text += f", {self.truncated:,} truncated"
        if self.dropped:
            text += f", {self.dropped:,} dropped (no supervised token left)"
        return text


def encode(rows: Dataset, task, split: str) -> Encoded:
    """Tokenize with `task.encode`; count truncated rows; drop and count rows in which no token is supervised."""

    def with_flags(row: dict, index: int) -> dict:
        try:
            features, truncated = task.encode(row)
        except InputError as error:
            raise InputError(f"{split} row {index + 1}: {error}") from None
        labels = features["labels"]
        supervised = any(label != -100 for label in labels) if isinstance(labels, list) else True
        return {**features, "_truncated": truncated, "_supervised": supervised}

    for column in task.columns.values():
        if column not in rows.column_names:
            raise InputError(f"the {split} rows have no column {column!r}: theirs are {', '.join(rows.column_names)}")
    encoded = rows.map(with_flags, with_indices=True, remove_columns=rows.column_names, desc=f"tokenize {split}")
    truncated = sum(encoded["_truncated"])
    keep = [i for i, supervised in enumerate(encoded["_supervised"]) if supervised]
    dropped = len(encoded) - len(keep)
    if not keep:
        raise InputError(f"no {split} row has a supervised token left: is --max_length {task.max_length} too short?")
    encoded = encoded.select(keep) if dropped else encoded
    return Encoded(encoded.remove_columns(["_truncated", "_supervised"]), truncated, dropped)


def hold_out(encoded: Encoded, share: float, seed: int) -> tuple[Encoded, Encoded | None]:
    """(training rows, validation rows taken out of them); none from fewer than 1 / share rows."""
    count = int(len(encoded.rows) * share)
    if not count:
        return encoded, None
    parts = encoded.rows.train_test_split(test_size=count, seed=seed)
    return Encoded(parts["train"], encoded.truncated, encoded.dropped), Encoded(parts["test"], 0, 0)


@torch.no_grad()
def check_causal(model: torch.nn.Module) -> None:
    """Refuse to train an encoder to generate: a token that sees the ones behind it learns to copy its label.

    Changing the last token of a row must not change the logits before it.
    """
    generator, words = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
    rows = torch.randint(words, (1, 8), generator=generator).repeat(2, 1).to(model.device)
    rows[1, -1] = (rows[0, -1] + 1) % words
    training = model.training
    model.eval()
    logits = model(input_ids=rows, use_cache=False).logits.float()
    model.train(training)
    change = (logits[0] - logits[1]).abs()
    if change[:-1].max() > 0.01 * change[-1].max():
        raise InputError(
            f"{type(model).__name__} sees the tokens behind each token, so it cannot learn to generate text: choose a "
            "causal language model, or --task text-classification or token-classification"
        )


@torch.no_grad()
def check_packing(model: torch.nn.Module, collate) -> None:
    """Refuse a model in which rows that `collate` packs see each other.

    Changing the first of two packed rows must not change the logits of the second; what it changes where the two are
    one row gives the scale. Models that carry state along the row, or that find no boundary in position_ids, fail.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    name = type(base).__name__
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise InputError(f"--packing: {name} takes no position_ids, so packed rows would see each other")
    generator, words = torch.Generator().manual_seed(0), base.get_input_embeddings().num_embeddings
    first, other, second = torch.randint(words, (3, 8), generator=generator).tolist()
    training = model.training
    model.eval()

    def second_logits(rows: list[list[int]]) -> torch.Tensor:
        batch = collate([{"input_ids": ids, "labels": ids} for ids in rows])
        batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labels"}
        return model(**batch, use_cache=False).logits[0, 8:].float()

    packed = second_logits([first, second]) - second_logits([other, second])
    joined = second_logits([first + second]) - second_logits([other + second])
    model.train(training)
    if not packed.abs().max() <= 0.1 * joined.abs().max():
        raise InputError(f"--packing: in {name} packed rows see each other; train without --packing")
