import pytest
import torch
import torch.nn.functional as F

import pyfast
from pyfast.ops import linear_cross_entropy

OPTIONS = {
    "plain": {},
    "frozen": {"frozen": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "bias": {"bias": True},
    "lora": {"rank": 3, "frozen": True},
    "lora_dominates": {"rank": 3, "scaling": 8.0, "frozen": True},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 0.8},
    "logit_scale": {"logit_scale": 0.25},
    "z_loss": {"z_loss": 10.0},
    "num_items": {"num_items_in_batch": 17, "z_loss": 0.1, "weight": True},
    "all": {
        **{"bias": True, "rank": 3, "scaling": 0.5, "weight": True, "label_smoothing": 0.3, "softcap": 2.0},
        **{"z_loss": 0.3, "logit_scale": 2.0, "ignore_index": 3},
    },
}
OPTIONS["all_sum"] = {**OPTIONS["all"], "reduction": "sum"}
OPTIONS["all_none"] = {**OPTIONS["all"], "reduction": "none"}
OPTIONS["all_frozen"] = {**OPTIONS["all"], "frozen": True}


def inputs(
    rows,
    features,
    classes,
    dtype=torch.float32,
    *,
    bias=False,
    rank=0,
    frozen=False,
    parameters=None,
    weight=False,
    ignored=0.3,
    ignore_index=-100,
    **options,
):
    """Hidden states, head, targets of which some are ignored, and the options; parameters: the dtype of the head."""
    rows = (rows,) if isinstance(rows, int) else rows
    parameters = parameters or dtype

    def tensor(*shape, dtype=parameters):
        return torch.randn(shape).to(dtype)

    x = tensor(*rows, features, dtype=dtype).requires_grad_()
    head = (tensor(classes, features) / features**0.5).requires_grad_(not frozen)
    target = torch.randint(classes, rows)
    target[torch.rand(rows) < ignored] = ignore_index
    if bias:
        options["linear_bias"] = tensor(classes).requires_grad_(not frozen)
    if rank:
        options["lora_A"] = (tensor(rank, features) / features**0.5).requires_grad_()
        options["lora_B"] = (tensor(classes, rank) / rank**0.5).requires_grad_()
    if weight:
        options["weight"] = torch.rand(classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1
    return (x, head, target), {"ignore_index": ignore_index, **options}


def leaves(args, options):
    return [t for t in (*args, *options.values()) if torch.is_tensor(t) and t.requires_grad]


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradient(name):
    (x, head, target), options = inputs(4, 3, 7, torch.float64, **OPTIONS[name])
    wanted = {k: v for k, v in options.items() if torch.is_tensor(v) and v.requires_grad}

    def loss(x, head, *tensors):
        return linear_cross_entropy(x, head, target, **{**options, **dict(zip(wanted, tensors, strict=True))})

    with pyfast.use_backend("reference"):
        assert torch.autograd.gradcheck(loss, (x, head, *wanted.values()))


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_is_the_reference(name):
    args, options = inputs((3, 4), 5, 21, torch.float64, **OPTIONS[name])
    results = []
    for backend in ("reference", "torch"):
        with pyfast.use_backend(backend):
            loss = linear_cross_entropy(*args, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves(args, options))))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_follows_torch(backend, reduction):
    (x, head, target), options = inputs(9, 5, 21, reduction=reduction, label_smoothing=0.2, weight=True)
    with pyfast.use_backend(backend):
        for h, t in ((x, target), (x[0], target[0]), (x[:0], target[:0]), (x, target * 0 - 100)):
            loss, expected = linear_cross_entropy(h, head, t, **options), F.cross_entropy(h @ head.T, t, **options)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            gradients = [torch.autograd.grad(y.sum(), (x, head)) for y in (loss, expected)]
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_num_items(backend):
    """As in Trainer: the parts of a batch, each divided by the whole's number of items, add up to the whole."""
    (x, head, target), _ = inputs(12, 5, 21, z_loss=0.1)
    items = (target != -100).sum()
    with pyfast.use_backend(backend):
        whole = linear_cross_entropy(x, head, target, z_loss=0.1)
        for n in (items, int(items)):
            parts = [
                linear_cross_entropy(x[i], head, target[i], z_loss=0.1, num_items_in_batch=n)
                for i in (slice(0, 3), slice(3, 12))
            ]
            torch.testing.assert_close(sum(parts), whole)
        assert linear_cross_entropy(x, head, target * 0 - 100, num_items_in_batch=items) == 0


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"input": torch.randn(4, 6)}, ValueError, "linear_weight is float32 \\(5, 3\\) on cpu, expected \\(V, 6\\)"),
        ({"input": torch.tensor(1.0)}, ValueError, "input is float32 \\(\\)"),
        ({"linear_weight": torch.randn(0, 3)}, ValueError, "no classes"),
        ({"linear_weight": torch.randn(5, 3, device="meta")}, ValueError, "linear_weight is .* on meta"),
        ({"linear_weight": torch.ones(5, 3, dtype=torch.int8)}, TypeError, "linear_weight is int8"),
        ({"target": torch.zeros(2, 2, dtype=torch.long)}, ValueError, "target is int64 \\(2, 2\\)"),
        ({"target": torch.tensor([0, 1, 2, 5])}, ValueError, "out of range, the first 5"),
        ({"linear_bias": torch.randn(4)}, ValueError, "linear_bias is float32 \\(4,\\)"),
        ({"lora_A": torch.randn(2, 3)}, ValueError, "lora_A and lora_B go together"),
        ({"lora_A": torch.randn(2, 4), "lora_B": torch.randn(5, 2)}, ValueError, "lora_A is float32 \\(2, 4\\)"),
        ({"lora_A": torch.randn(0, 3), "lora_B": torch.randn(5, 0)}, ValueError, "r of 1 or more"),
        ({"lora_A": torch.randn(2, 3), "lora_B": torch.randn(5, 1)}, ValueError, "lora_B is .* expected \\(5, 2\\)"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "num_items_in_batch replaces the divisor"),
        ({"num_items_in_batch": "3"}, TypeError, "num_items_in_batch is str"),
        ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch is -1"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch is float32 \\(2,\\)"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {
        "input": torch.randn(4, 3),
        "linear_weight": torch.randn(5, 3),
        "target": torch.tensor([0, 1, -100, 4]),
    }
    with pytest.raises(error, match=words):
        linear_cross_entropy(**{**arguments, **change})
