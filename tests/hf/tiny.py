"""Tiny models of every family, batches for them, and the comparison of a patched model with a stock one."""

import copy
import functools

import torch
import transformers
from peft import LoraConfig, get_peft_model

from pyfast.close import Step, compare_steps
from pyfast.verification import InDouble

VOCAB, PAD = 67, 0
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
    "num_labels": 3,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.1,
}

#: case -> (model class, configuration class, configuration)
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 12}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, "sliding_window": 5, "partial_rotary_factor": 0.5}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {
            **_LLAMA,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
        },
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_LLAMA, "logit_scale": 0.25, "use_qk_norm": False}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **_LLAMA,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.5,
            "attn_implementation": "eager",  # older transformers choose SDPA, which drops the cap
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "bert-sequence": ("BertForSequenceClassification", "BertConfig", _BERT),
    "bert-token": ("BertForTokenClassification", "BertConfig", _BERT),
    "roberta-sequence": ("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    "roberta-token": ("RobertaForTokenClassification", "RobertaConfig", _BERT),
    "llama-sequence": ("LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "num_labels": 3}),
}
CAUSAL = ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "cohere", "gemma2", "gpt2"]


@functools.cache
def _stock(case: str, dtype: torch.dtype, adapter: str):
    """adapter: "none", "lora" (on every projection) or "head" (on lm_head too)."""
    cls, config_cls, config = CASES[case]
    torch.manual_seed(1)
    model = getattr(transformers, cls)(getattr(transformers, config_cls)(**config))
    with torch.no_grad():  # biases and norms at their initial values would hide errors
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    model = model.to(dtype)
    if adapter != "none":
        model = add_lora(model, case, head=adapter == "head")
    return model.train()


def add_lora(model, case: str, head: bool = False, **options):
    """PEFT's wrapper around the model, with adapters that change its result."""
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if _is_linear(m)}
    outside = {"lm_head", "score", "classifier", "out_proj"}
    targets = sorted(linear - outside) + (["lm_head"] if head else [])
    task = "CAUSAL_LM" if case in CAUSAL else "TOKEN_CLS" if case.endswith("token") else "SEQ_CLS"
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": task, **options}
    model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def _is_linear(module):
    return isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)


def stock(case: str, dtype: torch.dtype = torch.float32, adapter: str = "none"):
    """A fresh stock model in training mode; always the same weights for the same arguments."""
    return copy.deepcopy(_stock(case, dtype, adapter))


def batch(case: str, kind: str = "full") -> dict[str, torch.Tensor]:
    """kind: "full", "right" or "left" padded, "packed" (position_ids that restart), "packed-rows" (two such rows)."""
    generator = torch.Generator().manual_seed(3)
    rows, length = (1, 23) if kind == "packed" else (2, 12)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    result = {"input_ids": ids}
    labels = ids.clone()
    labels[:, :2] = -100
    if kind in ("right", "left"):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, 8:] = 0
        mask[1, 11:] = 0
        if kind == "left":
            mask = mask.flip(-1)
            # the last padding has no key to look at, so what it predicts is not defined
            labels[torch.arange(rows), mask.argmax(-1)] = -100
        result["attention_mask"] = mask
        ids[mask == 0] = PAD
        labels[mask == 0] = -100
    if kind.startswith("packed"):
        lengths = [[7, 1, 12, 3]] if kind == "packed" else [[5, 7], [10, 2]]
        result["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        labels[result["position_ids"] == 0] = -100
        result["use_cache"] = False  # transformers looks for packed sequences only without a cache
    if case.endswith("sequence"):
        labels = torch.randint(3, (rows,), generator=generator)
    elif case.endswith("token"):
        labels = torch.where(labels < 0, labels, labels % 3)
    return {**result, "labels": labels}


def step(model, **inputs):
    """(loss, gradients of everything trainable) of one training step."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@functools.cache
def truth(case: str, dtype: torch.dtype, adapter: str, kind: str):
    """The stock model's step in fp64, from the weights of `dtype`."""
    model = stock(case, dtype, adapter).double()
    with InDouble():
        return step(model, **batch(case, kind))


def step_on(device: str, model, case: str, kind: str):
    """`step` of the case's batch on a device; the results on the CPU."""
    inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch(case, kind).items()}
    loss, gradients = step(model.to(device), **inputs)
    return loss.cpu(), {name: None if g is None else g.cpu() for name, g in gradients.items()}


@functools.cache
def stock_step(case: str, dtype: torch.dtype, adapter: str, kind: str, device: str = "cpu"):
    return step_on(device, stock(case, dtype, adapter), case, kind)


def assert_same_step(got, case: str, dtype: torch.dtype, adapter: str, kind: str, device: str = "cpu") -> None:
    assert_steps_agree(got, truth(case, dtype, adapter, kind), stock_step(case, dtype, adapter, kind, device), dtype)


def assert_steps_agree(got, truth, own, dtype: torch.dtype) -> None:
    """The error rule for a whole step: pyfast/close.py."""
    assert got[1].keys() == truth[1].keys()
    got, truth, own = (Step(loss, None, gradients) for loss, gradients in (got, truth, own))
    wrong = [row for row in compare_steps(got, truth, own, torch.finfo(dtype).eps / 2) if not row.passed]
    assert not wrong, wrong
