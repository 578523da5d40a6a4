"""Sentiment with BERT by transformers' Trainer, as tutorials write it; PyFast is the one added line.

    python examples/trainer_bert.py --model FOLDER_OR_HUB_ID --train train.tsv --dev dev.tsv [--stock]

The files have a header line and columns sentence, label. Prints one JSON object with the metrics and the time.
"""

import argparse
import json

import numpy as np
from datasets import load_dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import pyfast

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="google-bert/bert-base-uncased")
parser.add_argument("--train", required=True)
parser.add_argument("--dev", required=True)
parser.add_argument("--max_train_samples", type=int, default=2000)
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output_dir", default="trainer_bert_output")
parser.add_argument("--stock", action="store_true", help="leave the added line out")
args = parser.parse_args()

set_seed(args.seed)  # the head's first weights
tokenizer = AutoTokenizer.from_pretrained(args.model)
dataset = load_dataset("csv", data_files={"train": args.train, "dev": args.dev}, delimiter="\t", quoting=3)
dataset["train"] = dataset["train"].select(range(min(args.max_train_samples, len(dataset["train"]))))
dataset = dataset.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)


def compute_metrics(prediction):
    labels = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": accuracy_score(prediction.label_ids, labels),
        "f1": f1_score(prediction.label_ids, labels),
    }


training_args = TrainingArguments(
    output_dir=args.output_dir,
    learning_rate=1e-4,
    per_device_train_batch_size=16,
    num_train_epochs=1,
    save_strategy="no",
    logging_steps=10,
    report_to="none",
    disable_tqdm=True,
    seed=args.seed,
)
model = AutoModelForSequenceClassification.from_pretrained(
    args.model,
    num_labels=2,
    hidden_dropout_prob=args.dropout,
    attention_probs_dropout_prob=args.dropout,
)
if not args.stock:
    pyfast.patch(model)  # the one added line

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["dev"],
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trained = trainer.train()
metrics = trainer.evaluate()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
result = {name: round(metrics[f"eval_{name}"], 6) for name in ("loss", "accuracy", "f1")}
print(json.dumps({**result, "train_seconds": trained.metrics["train_runtime"], "losses": losses}))
