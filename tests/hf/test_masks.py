"""Masks and packing: what the attention is told is what transformers means, and sequences do not see each other."""

import pytest
import torch
from hf.tiny import CAUSAL, PAD, VOCAB, assert_same_step, batch, step, stock
from transformers import StaticCache, masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

import pyfast
from pyfast.hf import attention, loss


def _mask(model, function=create_causal_mask, length=6, rows=2, **kwargs):
    arguments = {"attention_mask": None, "past_key_values": None, **kwargs}
    return function(config=model.config, inputs_embeds=torch.zeros(rows, length, 4), **arguments)


@pytest.fixture(scope="module")
def patched():
    model = stock("mistral")
    pyfast.patch(model)
    return model


def test_plain_causal_needs_no_mask(patched):
    assert _mask(patched) is None
    assert _mask(patched, create_sliding_window_causal_mask, length=20) is None
    assert _mask(patched, attention_mask=torch.ones(2, 6)) is None


def test_padding_stays_two_dimensional(patched):
    padding = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    for function in (create_causal_mask, create_sliding_window_causal_mask):
        assert torch.equal(_mask(patched, function, attention_mask=padding), padding.bool())
    assert torch.equal(create_bidirectional_mask(patched.config, torch.zeros(2, 6, 4), padding), padding.bool())


@pytest.mark.parametrize("function", [create_causal_mask, create_sliding_window_causal_mask])
def test_packed_boundaries(patched, function):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6, 7], [*range(16)]])
    packed = _mask(patched, function, length=16, position_ids=positions)
    assert isinstance(packed, attention.Packed)
    assert packed.cu_seqlens.tolist() == [0, 3, 7, 8, 16, 32]
    assert packed.max_seqlen == 16


def test_other_patterns_are_dense(patched):
    """A pattern that the op does not know is given in full, as SDPA gets it."""
    stock_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def prefix(batch, head, q, k):
        return k < 2

    dense = _mask(patched, or_mask_function=prefix)
    patched.config._attn_implementation, before = "sdpa", patched.config._attn_implementation
    try:
        expected = _mask(patched, or_mask_function=prefix)
    finally:
        patched.config._attn_implementation = before
    assert dense.shape == (2, 1, 6, 6)
    assert torch.equal(dense, expected)
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is stock_mask


@pytest.mark.parametrize("kind", ["blocks", "prefix", "anticausal", "skips"])
def test_packed_refuses_what_it_cannot_say(kind):
    """Masks that look packed between neighbours but are not causal within sequences."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])

    def function(b, h, q, k):
        same = ids[b, q] == ids[b, k]
        if kind == "blocks":
            return same
        if kind == "prefix":
            return (same & (k <= q)) | (k < 1) & (k <= q)
        if kind == "anticausal":
            return same & (k >= q)
        return same & (k <= q) & ((q - k) != 2)

    assert attention._packed(function, 1, 8, None, "cpu") is None


def test_a_mask_of_the_users_own():
    model = stock("llama").eval()
    ids = batch("llama")["input_ids"]
    own = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    own |= torch.eye(12, dtype=torch.bool)
    expected = model(ids, attention_mask=own).logits
    pyfast.patch(model)
    torch.testing.assert_close(model(ids, attention_mask=own).logits, expected, atol=1e-5, rtol=1e-5)
    additive = torch.zeros(2, 1, 12, 12).masked_fill(~own, torch.finfo(torch.float32).min)
    torch.testing.assert_close(model(ids, attention_mask=additive).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CAUSAL)
def test_packed_sequences_are_as_if_alone(case):
    model = stock(case, adapter="lora").eval()
    pyfast.patch(model)
    lengths = [7, 1, 12, 3]
    ids = batch(case, "packed")["input_ids"]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    kwargs = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 12, "max_length_k": 12}
    packed = model(ids, position_ids=positions, use_cache=False, **kwargs).logits
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["full", "right", "left", "packed"])
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "gemma2", "gpt2", "bert-token"])
def test_the_registered_attention(case, kind):
    """The family's own attention modules, with masks and windows as the registered implementation gets them."""
    if case not in CAUSAL and kind == "packed":
        return
    model = stock(case)
    pyfast.patch(model, ops=["attention"], strict=True)
    assert_same_step(step(model, **batch(case, kind)), case, torch.float32, "none", kind)


def test_boundaries_alone_keep_sequences_apart():
    """An encoder, whose packed position_ids transformers does not look at."""
    model = stock("bert-token").eval()
    pyfast.patch(model)
    ids = batch("bert-token", "packed")["input_ids"]
    lengths = [9, 14]
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    boundaries = torch.tensor([0, 9, 23], dtype=torch.int32)
    kwargs = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 14, "max_length_k": 14}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), **kwargs).logits
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("mode", ["train", "eval", "keep_logits"])
def test_a_loss_never_sees_across_packed_sequences(mode):
    """A stock model makes a cache where use_cache is left to its configuration, and then looks for no boundaries."""
    model = stock("llama").train(mode != "eval")
    inputs = batch("llama", "packed")
    apart = model(**inputs).loss
    inputs.pop("use_cache")
    assert not torch.isclose(model(**inputs).loss, apart)
    pyfast.patch(model, keep_logits=mode == "keep_logits")
    torch.testing.assert_close(model(**inputs).loss, apart)


def test_boundaries_are_found_once_per_step(monkeypatch):
    model = stock("llama")
    pyfast.patch(model)
    calls = []
    found = attention._packed
    monkeypatch.setattr(attention, "_packed", lambda *args: calls.append(args) or found(*args))
    step(model, **batch("llama", "packed"))
    assert len(calls) == 1


@pytest.mark.parametrize("case", CAUSAL)
def test_boundaries_that_are_given_are_not_looked_for(case, monkeypatch):
    """As on a GPU, where no layer leaves tokens out: neither transformers nor PyFast looks at the position_ids."""
    model, inputs = stock(case, adapter="lora"), batch(case, "packed")
    pyfast.patch(model)
    monkeypatch.setattr(loss, "tokens", lambda *_: None)
    for module, name in ((masking_utils, "find_packed_sequence_indices"), (attention, "_packed")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("looked for boundaries"))
    bounds = torch.tensor([0, 7, 8, 20, 23], dtype=torch.int32)
    ranges = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    got = step(model, **inputs, **ranges)
    monkeypatch.undo()
    assert_same_step(got, case, torch.float32, "lora", "packed")


def _generate(model, **kwargs):
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = PAD, 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **kwargs)


@pytest.mark.parametrize("case", CAUSAL)
def test_generate(case):
    """Greedy tokens through the growing cache, from left-padded prompts; windows are shorter than the sequences."""
    model = stock(case, adapter="lora").eval()
    expected = _generate(model)
    pyfast.patch(model)
    assert torch.equal(_generate(model), expected)


def test_generate_with_a_static_cache():
    model = stock("llama").eval()
    expected = _generate(model, cache_implementation="static", disable_compile=True)
    pyfast.patch(model)
    assert torch.equal(_generate(model, cache_implementation="static", disable_compile=True), expected)
    ids = batch("llama")["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=20)
    torch.testing.assert_close(
        model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5
    )
