"""Every family, patched, takes the training step that it takes stock: loss and every gradient by the error rule."""

import pytest
import torch
from hf.tiny import ADAPTERS, CASES, CAUSAL, assert_same_step, batch, step, stock

import pyfast

KINDS = ["full", "right", "left", "packed", "packed-rows"]


def combinations():
    for case in CASES:
        for adapter in ADAPTERS:
            if adapter == "head" and case not in CAUSAL:
                continue
            for kind in KINDS:
                if kind.startswith("packed") and case not in CAUSAL:
                    continue
                if adapter != "lora" and kind not in ("full", "packed"):
                    continue  # masks and adapters do not meet: one adapter sees every kind
                yield case, adapter, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("case", "adapter", "kind"), list(combinations()))
def test_training_step(case, adapter, kind, dtype):
    model = stock(case, dtype, adapter)
    report = pyfast.patch(model, strict=True)
    assert report.swapped
    assert_same_step(step(model, **batch(case, kind)), case, dtype, adapter, kind)
