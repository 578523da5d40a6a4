import pytest
import torch
import torch.nn.functional as F

import pyfast
from pyfast.ops import cross_entropy

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored": {"ignore_index": 3},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_alone": {"label_smoothing": 1.0},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 10.0},
    "z_loss_none": {"z_loss": 0.1, "reduction": "none"},
    "all": {"weight": True, "label_smoothing": 0.3, "softcap": 3.0, "z_loss": 0.3, "ignore_index": 3},
    "all_sum": {"weight": True, "label_smoothing": 0.3, "softcap": 3.0, "z_loss": 0.3, "reduction": "sum"},
    "all_none": {"weight": True, "label_smoothing": 0.3, "softcap": 3.0, "z_loss": 0.3, "reduction": "none"},
}


def inputs(rows, classes, dtype=torch.float32, scale=2.0, ignored=0.3, ignore_index=-100, **options):
    """Logits, targets of which some are ignored, and the options, with class weights made where asked for."""
    logits = (torch.randn(rows, classes) * scale).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    target[torch.rand(rows) < ignored] = ignore_index
    if options.get("weight") is True:
        options["weight"] = torch.rand(classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1
    return (logits, target), {"ignore_index": ignore_index, **options}


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradient(name):
    args, options = inputs(4, 7, torch.float64, **OPTIONS[name])
    with pyfast.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: cross_entropy(x, args[1], **options), args[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_is_the_reference(name):
    (logits, target), options = inputs(9, 21, torch.float64, **OPTIONS[name])
    results = []
    for backend in ("reference", "torch"):
        with pyfast.use_backend(backend):
            loss = cross_entropy(logits, target, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_follows_torch(backend, reduction, label_smoothing):
    (logits, target), options = inputs(9, 21, reduction=reduction, label_smoothing=label_smoothing, weight=True)
    with pyfast.use_backend(backend):
        for x, t in ((logits, target), (logits[0], target[0]), (logits[:0], target[:0]), (logits, target * 0 - 100)):
            loss, expected = cross_entropy(x, t, **options), F.cross_entropy(x, t, **options)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            gradients = [torch.autograd.grad(y.sum(), logits)[0] for y in (loss, expected)]
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"input": torch.randn(2, 3, 5)}, ValueError, "input is float32 \\(2, 3, 5\\)"),
        ({"input": torch.ones(4, 5, dtype=torch.long)}, TypeError, "input is int64"),
        ({"input": torch.randn(4, 0)}, ValueError, "no classes"),
        ({"target": [1, 2]}, TypeError, "target is list"),
        ({"target": torch.tensor([1, 2])}, ValueError, "target is int64 \\(2,\\) on cpu, expected \\(4,\\)"),
        ({"target": torch.rand(4, 5)}, TypeError, "class probabilities are not served"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target is int32"),
        ({"target": torch.zeros(4, dtype=torch.long, device="meta")}, ValueError, "on meta"),
        ({"target": torch.tensor([0, 5, -1, 1])}, ValueError, "2 values out of range, the first 5: expected 0 to 4"),
        ({"weight": torch.rand(4)}, ValueError, "weight is float32 \\(4,\\)"),
        ({"weight": torch.rand(5, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"weight": torch.rand(5, device="meta")}, ValueError, "weight is .* on meta"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index is 0.5"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        cross_entropy(**{"input": torch.randn(4, 5), "target": torch.tensor([0, 1, -100, 4]), **change})
