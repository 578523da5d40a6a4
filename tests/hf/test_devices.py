"""What a GPU must not be waited for, shown without one: tensors on the meta device have no values to wait for."""

import pytest
import torch
from hf.tiny import CAUSAL, add_lora, batch, stock

import pyfast
from pyfast import dispatch
from pyfast.hf import lora


def test_seeds_of_dropout_are_drawn_on_the_device_that_uses_them():
    """A seed made on the CPU would be copied, and the copy waits for all that the GPU has still to do."""
    assert [seed.device.type for seed in lora.seeds(0.1, 2, torch.device("meta"))] == ["meta", "meta"]


@pytest.mark.parametrize("kind", ["full", "right", "packed"])
@pytest.mark.parametrize("case", CAUSAL)
def test_a_step_reads_no_value(case, kind, monkeypatch):
    """Forward and backward of a patched model, by the fakes of the kernels; packed sequences with their boundaries."""
    if dispatch.unavailable("cpu"):
        pytest.skip(dispatch.unavailable("cpu"))
    model = add_lora(stock(case), case, lora_dropout=0.1)
    pyfast.patch(model, strict=True)
    inputs = batch(case, kind)
    if kind == "packed":
        bounds = torch.tensor([0, 7, 8, 20, 23], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    inputs = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in inputs.items()}
    monkeypatch.setattr(dispatch, "choose", lambda op, tensor, size=None: "cpu")
    model.to("meta")(**inputs).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
