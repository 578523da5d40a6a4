"""Tokens: what the layers leave out, that it changes nothing, and when nothing may be left out."""

import contextlib

import pytest
import torch
from hf.tiny import CAUSAL, PAD, VOCAB, assert_same_step, assert_steps_agree, batch, step, stock

import pyfast
from pyfast import ops
from pyfast.verification import InDouble

FP32 = torch.float32
CLASSIFIERS = ["bert-sequence", "roberta-sequence", "llama-sequence"]


@pytest.fixture
def calls(monkeypatch):
    """(queries, keys) of each attention over ranges of tokens: one per layer."""
    seen, run = [], ops.attention_varlen

    def varlen(q, k, *args, **kwargs):
        seen.append((len(q), len(k)))
        return run(q, k, *args, **kwargs)

    monkeypatch.setattr(ops, "attention_varlen", varlen)
    return seen


def _patched(case, **kwargs):
    model = stock(case, **kwargs)
    pyfast.patch(model, strict=True)
    return model


def _assert_agrees_with_stock(case, inputs, prepare=lambda model: None):
    """A patched step on `inputs` by the error rule, beside the stock model's."""
    models = [stock(case), stock(case), stock(case).double()]
    pyfast.patch(models[0])
    for model in models:
        prepare(model)
    got, own = (step(model, **inputs) for model in models[:2])
    with InDouble():
        truth = step(models[2], **inputs)
    assert_steps_agree(got, truth, own, FP32)


# ---- what is left out; that the steps agree for every family and mask is in test_families.py


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("right", [(19, 19), (17, 19)]),  # 8 and 11 real tokens; the first of each row has no label to predict
        ("left", [(19, 19), (19, 19)]),
        ("packed", [(23, 23), (21, 23)]),
        ("packed-rows", [(24, 24), (22, 24)]),
    ],
)
@pytest.mark.parametrize("case", CAUSAL)
def test_a_language_model_leaves_out_padding_and_what_has_no_label(case, kind, expected, calls):
    step(_patched(case), **batch(case, kind))
    assert calls == expected


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_leaves_out_padding_and_reads_one_token(case, calls):
    step(_patched(case), **batch(case, "right"))
    assert calls == [(19, 19), (2, 19)]


def test_every_token_with_a_label_is_computed(calls):
    model = _patched("llama")
    ids = batch("llama")["input_ids"]
    model(input_ids=ids, labels=ids)
    assert calls == []


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", ["llama", "mistral", "gpt2", "cohere"])
def test_prompts_masked_in_packed_rows(case, given, calls):
    """Labels begin anywhere in a sequence, one sequence has none, and a gap lies within another."""
    lengths, prompts = [7, 5, 3, 8], [4, 5, 1, 2]
    inputs = batch(case, "packed")
    inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = inputs["input_ids"].clone()
    labels[inputs["position_ids"] < torch.tensor(prompts).repeat_interleave(torch.tensor(lengths))] = -100
    labels[0, -3] = -100
    inputs["labels"] = labels
    models = [stock(case), stock(case), stock(case).double()]
    pyfast.patch(models[0])
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ranges = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    got, own = step(models[0], **inputs, **(ranges if given else {})), step(models[1], **inputs)
    with InDouble():
        assert_steps_agree(got, step(models[2], **inputs), own, FP32)
    assert calls == [(23, 23), (4 + 0 + 3 + 7, 23)]


@pytest.mark.parametrize(
    "bounds, words",
    [([0, 9], None), ([0, 12, 9, 23], "decreases from 12 to 9 at position 2"), ([2, 23], "begins with 2, expected 0")],
)
def test_boundaries_that_are_none(bounds, words, calls):
    """They go to the attention as they are: it says what is wrong, or leaves rows without a sequence at zero."""
    inputs = batch("llama", "packed")
    bounds = torch.tensor(bounds, dtype=torch.int32)
    ranges = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 23, "max_length_k": 23}
    model = _patched("llama")
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        model(**inputs, **ranges)
    assert set(calls) == {(23, 23)} and len(calls) == (1 if words else 2)


def test_no_label_at_all():
    inputs = batch("llama", "right")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, gradients = step(_patched("llama"), **inputs, num_items_in_batch=1)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("case", CLASSIFIERS)
@pytest.mark.parametrize("training", [True, False])
def test_class_logits_are_the_stock_ones(case, training, calls):
    model, patched = stock(case).train(training), _patched(case).train(training)
    inputs = batch(case, "right")
    calls.clear()
    torch.testing.assert_close(patched(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["llama", "gpt2", "bert-sequence"])
def test_gradient_checkpointing(case, reentrant, calls):
    model = _patched(case, adapter="lora")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    got = step(model, **batch(case, "right"))
    assert len(calls) == 4
    assert calls[0] == (19, 19)
    assert_same_step(got, case, FP32, "lora", "right")


# ---- when nothing may be left out


def test_a_label_at_padding(calls):
    """Stock attends from padding to real tokens, and its prediction there counts if it has a label."""
    inputs = batch("llama", "right")
    inputs["labels"][inputs["attention_mask"] == 0] = PAD
    _assert_agrees_with_stock("llama", inputs)
    assert calls == []


def test_a_gap_in_the_mask(calls):
    inputs = batch("mistral")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 4:6] = 0
    inputs["labels"][0, 3:7] = -100
    _assert_agrees_with_stock("mistral", inputs)
    assert calls == []


def test_the_first_token_of_a_class_is_padding(calls):
    step(_patched("bert-sequence"), **batch("bert-sequence", "left"))
    assert calls == []


def test_the_last_token_of_a_class_is_masked(calls):
    """The stock head looks at the ids, not at the mask."""
    inputs = batch("llama-sequence", "right")
    inputs["input_ids"][0, 9] = VOCAB - 1
    _assert_agrees_with_stock("llama-sequence", inputs)
    assert calls == []


def test_hidden_states_are_shown_whole(calls):
    model, patched = stock("llama"), _patched("llama")
    inputs = batch("llama", "right")
    expected, got = (m(**inputs, output_hidden_states=True).hidden_states for m in (model, patched))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert calls == []


def test_a_hook_sees_the_whole_batch(calls):
    shapes = []

    def prepare(model):
        model.model.layers[1].register_forward_hook(lambda module, args, output: shapes.append(output.shape))

    _assert_agrees_with_stock("llama", batch("llama", "right"), prepare)
    assert shapes == [(2, 12, 32)] * 3
    assert calls == []


def test_a_hook_inside_an_encoder_layer(calls):
    def prepare(model):
        model.bert.encoder.layer[0].output.register_forward_hook(lambda module, args, output: None)

    _assert_agrees_with_stock("bert-sequence", batch("bert-sequence", "right"), prepare)
    assert calls == []


def test_a_cache_asked_for_is_whole(calls):
    inputs = batch("llama-sequence", "right")
    inputs.pop("labels")
    model = _patched("llama-sequence").eval()
    assert model(**inputs).past_key_values.get_seq_length() == 12
    assert calls == []


def test_layers_that_were_removed(calls):
    """The first and the last layer are those that run."""

    def prepare(model):
        model.model.layers = model.model.layers[:1]

    _assert_agrees_with_stock("llama", batch("llama", "right"), prepare)
    assert calls == [(17, 19)]


def test_embeddings_in_place_of_ids(calls):
    model, patched = stock("llama"), _patched("llama")
    inputs = batch("llama", "right")
    ids = inputs.pop("input_ids")
    losses = [m(inputs_embeds=m.get_input_embeddings()(ids), **inputs).loss for m in (model, patched)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert calls == [(19, 19), (17, 19)]
