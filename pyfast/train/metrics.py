"""Metrics of an evaluation (scikit-learn computes them) and the two pictures: the loss curve and the ROC curve."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn import metrics as sk
from transformers import EvalPrediction


def class_scores(labels: np.ndarray, probabilities: np.ndarray, names: list[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and ROC-AUC. labels (n,), probabilities (n, classes).

    Two classes: precision, recall and F1 of the second one. More: the unweighted mean over classes, ROC-AUC one class
    against the rest. ROC-AUC needs rows of every class, and is left out where one has none.
    """
    binary = len(names) == 2
    predicted = probabilities.argmax(-1)
    average = {"average": "binary"} if binary else {"average": "macro", "labels": range(len(names))}
    precision, recall, f1, _ = sk.precision_recall_fscore_support(labels, predicted, zero_division=0, **average)
    scores = {"accuracy": sk.accuracy_score(labels, predicted), "precision": precision, "recall": recall, "f1": f1}
    if len(np.unique(labels)) == len(names) > 1:
        options = {} if binary else {"multi_class": "ovr", "labels": range(len(names))}
        scores["roc_auc"] = sk.roc_auc_score(labels, probabilities[:, 1] if binary else probabilities, **options)
    return {name: float(value) for name, value in scores.items()}


class ClassificationMetrics:
    """compute_metrics for one label per row; keeps the last labels and probabilities for the ROC curve.

    Each task computes its loss from all rows at once: Trainer's own eval_loss is the mean over batches, which depends
    on how rows were batched, and over several processes it is multiplied by their number.
    """

    columns = ("loss", "accuracy", "precision", "recall", "f1", "roc_auc")

    def __init__(self, names: list[str]):
        self.names = names
        self.last: tuple[np.ndarray, np.ndarray] | None = None

    def preprocess(self, logits, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.float().log_softmax(-1)

    def scores(self, labels: np.ndarray, log_probabilities: np.ndarray) -> dict[str, float]:
        self.last = labels, np.exp(log_probabilities)
        loss = -log_probabilities[np.arange(len(labels)), labels].mean(dtype=np.float64)
        return {"loss": float(loss), **class_scores(*self.last, self.names)}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.scores(prediction.label_ids, prediction.predictions)

    def roc_figure(self) -> Figure | None:
        """The ROC curve of the last evaluation: of the second class, or with three or more one curve each."""
        if self.last is None:
            return None
        labels, probabilities = self.last
        classes = [1] if len(self.names) == 2 else range(len(self.names))
        classes = [c for c in classes if 0 < (labels == c).sum() < len(labels)]
        if not classes:
            return None
        figure, axes = new_figure("false positive rate", "true positive rate")
        for c in classes:
            x, y, _ = sk.roc_curve(labels == c, probabilities[:, c])
            axes.plot(x, y, label=f"{self.names[c]} (area {sk.auc(x, y):.3f})")
        axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
        axes.legend(loc="lower right")
        return figure


class TokenClassificationMetrics(ClassificationMetrics):
    """The same over every labelled token (not over entities)."""

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        counted = prediction.label_ids != -100
        return self.scores(prediction.label_ids[counted], prediction.predictions[counted])


class LanguageModelMetrics:
    """compute_metrics for next-token prediction, over the supervised tokens of all rows."""

    columns = ("loss", "perplexity", "accuracy")

    def preprocess(self, logits, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits[0] if isinstance(logits, tuple) else logits
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = torch.stack(
            [F.cross_entropy(row.float(), t, reduction="none") for row, t in zip(logits, targets, strict=True)]
        )
        return loss, logits.argmax(-1) == targets

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        loss, right = prediction.predictions
        counted = np.pad(prediction.label_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100) != -100
        mean = float(loss[counted].mean(dtype=np.float64))
        return {"loss": mean, "perplexity": float(np.exp(mean)), "accuracy": float((right[counted] == 1).mean())}

    def roc_figure(self) -> None:
        return None


def new_figure(x: str, y: str):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def loss_figure(log_history: list[dict]) -> Figure:
    """Training and evaluation loss over steps, from Trainer's log."""
    figure, axes = new_figure("step", "loss")
    for key, name, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    if axes.lines:
        axes.legend()
    return figure


def save_figure(figure: Figure | None, path: Path) -> None:
    if figure is not None:
        figure.savefig(path, dpi=120)
