import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from pyfast.train.metrics import ClassificationMetrics, LanguageModelMetrics, class_scores


def test_two_classes_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    found = class_scores(np.array([0, 0, 1, 1]), probabilities, ["no", "yes"])
    assert found == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "roc_auc": 0.75})


def test_three_classes_take_the_mean_over_classes():
    found = class_scores(np.array([0, 1, 2, 2]), np.eye(3)[[0, 1, 2, 0]], ["a", "b", "c"])
    assert found["accuracy"] == 0.75
    assert found["precision"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["recall"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_roc_auc_is_left_out_where_a_class_has_no_row():
    assert "roc_auc" not in class_scores(np.array([1, 1]), np.array([[0.1, 0.9], [0.2, 0.8]]), ["no", "yes"])


def test_the_language_model_loss_is_the_mean_over_tokens_whatever_the_batches():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    metrics = LanguageModelMetrics()
    loss, right = metrics.preprocess(logits, labels)
    found = metrics(EvalPrediction((loss.numpy(), right.numpy()), labels.numpy()))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    accuracy = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100].float().mean()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(accuracy.item())


def test_the_loss_is_cross_entropy_and_the_roc_curve_ends_in_its_corners():
    metrics = ClassificationMetrics(["no", "yes"])
    logits = torch.randn(3, 2)
    labels = torch.tensor([0, 1, 1])
    found = metrics(EvalPrediction(metrics.preprocess(logits, labels).numpy(), labels.numpy()))
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    x, y = metrics.roc_figure().axes[0].lines[0].get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
