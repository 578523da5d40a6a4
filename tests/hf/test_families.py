"""Every family, patched, takes the training step that it takes stock: loss and every gradient by the error rule."""

import pytest
import torch
from hf.tiny import CASES, CAUSAL, assert_same_step, step_on, stock

import pyfast

FP32, BF16 = torch.float32, torch.bfloat16


def check_training_step(case, adapter, kind, dtype, device="cpu"):
    """tests/gpu asks for this on a GPU."""
    model = stock(case, dtype, adapter).to(device)
    report = pyfast.patch(model, strict=True)
    assert report.swapped
    assert_same_step(step_on(device, model, case, kind), case, dtype, adapter, kind, device)


def combinations():
    """Masks and adapters do not meet in the code, so that one adapter sees every mask."""
    for case in CASES:
        causal = case in CAUSAL
        for kind in ["full", "right", "left", "packed", "packed-rows"]:
            if causal or not kind.startswith("packed"):
                yield case, "lora", kind, FP32
        yield case, "lora", "right", BF16
        yield case, "none", "full", FP32
        yield case, "none", "right", BF16
        if causal:
            yield case, "lora", "packed", BF16
            yield case, "head", "packed", FP32
            yield case, "head", "full", BF16


@pytest.mark.parametrize(("case", "adapter", "kind", "dtype"), list(combinations()))
def test_training_step(case, adapter, kind, dtype):
    check_training_step(case, adapter, kind, dtype)
