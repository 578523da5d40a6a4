"""patch and unpatch: what they promise beside the arithmetic."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from hf.tiny import CASES, add_lora, assert_steps_agree, batch, step, stock, stock_step, truth
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn

import pyfast
from pyfast.hf.swap import stock_class

FP32 = torch.float32
_ENCODER_DECODER = {
    "vocab_size": 67,
    "d_model": 32,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


def _agree(model, case="llama", adapter="lora", kind="full", **kwargs):
    got = step(model, **batch(case, kind), **kwargs)
    assert_steps_agree(got, truth(case, FP32, adapter, kind), stock_step(case, FP32, adapter, kind), FP32)


def _is_stock(model):
    return all(stock_class(module) is type(module) for module in model.modules())


# ---- the patch itself


@pytest.mark.parametrize("case", CASES)
def test_unpatch_restores_exactly(case):
    model = stock(case, adapter="lora")
    inputs = batch(case, "right")
    before, loss, gradients = model.state_dict(), *step(model, **inputs)
    classes = [type(module) for module in model.modules()]
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    pyfast.patch(model)
    assert list(model.state_dict()) == list(before)
    step(model, **inputs)
    pyfast.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == attributes
    assert model.config._attn_implementation == stock(case, adapter="lora").config._attn_implementation
    again, gradients_again = step(model, **inputs)
    assert torch.equal(again, loss)
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())


def test_unpatch_reaches_a_forward_that_a_wrapper_holds():
    """accelerate's mixed precision keeps the bound forward of the model that it wraps."""
    model = stock("llama")
    pyfast.patch(model)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert model(**batch("llama")).logits is None
    pyfast.unpatch(model)
    assert model(**batch("llama")).logits is not None


def test_a_module_with_a_forward_of_its_own_is_reported():
    model = stock("llama")
    mlp, expected = model.model.layers[0].mlp, model(**batch("llama")).loss
    forward = mlp.forward
    mlp.forward = lambda x: forward(x)
    report = pyfast.patch(model)
    assert report.skipped == [("model.layers.0.mlp", "another library has given it a forward of its own")]
    torch.testing.assert_close(model(**batch("llama")).loss, expected)


def test_report_names_module_op_and_backend():
    model = stock("llama", adapter="head")
    report = pyfast.patch(model)
    rows = set(report.swapped)
    layer = "base_model.model.model.layers.1"
    for name, op in [
        (layer, "rms_norm"),
        (f"{layer}.self_attn", "attention"),
        (f"{layer}.self_attn", "rope"),
        (f"{layer}.mlp", "lora_mlp"),
        (f"{layer}.self_attn.q_proj", "lora_linear"),
        ("base_model.model.lm_head", "lora_linear"),
        ("base_model.model", "linear_cross_entropy"),
    ]:
        assert (name, op, pyfast.dispatch.choose(op, torch.empty(0))) in rows
    assert report.skipped == []
    text = str(report)
    assert "model.layers.*.mlp" in text
    assert "×2" in text


def test_patching_twice_is_patching_once():
    model = stock("llama", adapter="lora")
    first = pyfast.patch(model)
    classes = [type(module) for module in model.modules()]
    second = pyfast.patch(model)
    assert second.swapped == first.swapped
    assert [type(module) for module in model.modules()] == classes
    _agree(model)
    pyfast.unpatch(model)
    pyfast.unpatch(model)
    assert _is_stock(model)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert-token"])
def test_patch_before_peft(case):
    """PEFT wraps the projections of a patched model: they are served at once, and reported when patched again."""
    model = stock(case)
    pyfast.patch(model)
    model = add_lora(model, case)
    model.load_state_dict(stock(case, adapter="lora").state_dict())
    _agree(model, case)
    report = pyfast.patch(model, strict=True)
    assert "lora_linear" in {row.op for row in report.swapped}
    _agree(model, case)


def test_another_model_of_the_same_configuration_is_left_alone():
    config = transformers.LlamaConfig(**CASES["llama"][2])
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    inputs = batch("llama", "right")
    before = other(**inputs).logits
    pyfast.patch(one)
    assert other.config._attn_implementation == config._attn_implementation == "sdpa"
    assert torch.equal(other(**inputs).logits, before)
    assert _is_stock(other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_apart(copied):
    model = stock("llama", adapter="lora")
    pyfast.patch(model)
    twin = copied(model)
    _agree(twin)
    pyfast.unpatch(model)
    assert _is_stock(model)
    assert not _is_stock(twin)
    _agree(twin)
    pyfast.unpatch(twin)
    assert _is_stock(twin)
    assert twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (None, "not 'NoneType'"),
        ("gpt2", "not 'str'"),
        (transformers.LlamaForCausalLM, "not 'type'"),
        (nn.Linear(2, 2), "Linear holds none"),
    ],
)
def test_what_is_no_model_is_refused(thing, message):
    for function in (pyfast.patch, pyfast.unpatch):
        with pytest.raises(TypeError, match=message):
            function(thing)


@pytest.mark.parametrize(
    ("ops", "swapped"),
    [
        (["attention"], set()),
        (["lora_linear"], {"q_proj"}),
        (["rms_norm"], {"layers.0", "layers.0.input_layernorm"}),
        (["rms_norm", "lora_mlp", "linear_cross_entropy"], {"layers.0", "layers.0.mlp", ""}),
        (["attention", "rope", "lora_linears"], {"layers.0.self_attn"}),
    ],
)
def test_only_the_ops_asked_for(ops, swapped):
    model = stock("llama", adapter="lora")
    report = pyfast.patch(model, ops=ops, strict=True)
    assert {row.op for row in report.swapped} <= set(ops)
    names = {name: type(m) is not stock_class(m) for name, m in model.named_modules()}
    for suffix in swapped:
        assert any(value for name, value in names.items() if name.endswith(suffix)), suffix
    assert (model.config._attn_implementation == "pyfast") == ("attention" in ops)
    _agree(model)


def test_unknown_ops_are_refused():
    with pytest.raises(ValueError, match="no op is called flash"):
        pyfast.patch(stock("llama"), ops=["flash", "attention"])


def test_ops_that_nothing_uses_are_reported():
    model = stock("llama")
    report = pyfast.patch(model, ops=["rope", "layer_norm"])
    assert report.swapped == []
    assert [row.reason.split()[0] for row in report.skipped] == ["layer_norm", "rope"]
    with pytest.raises(RuntimeError, match="layer_norm was asked for"):
        pyfast.patch(model, ops=["layer_norm", "rms_norm"], strict=True)
    assert _is_stock(model)


# ---- families and layers without a row


@pytest.fixture
def unknown():
    torch.manual_seed(0)
    config = transformers.OlmoConfig(**{**CASES["llama"][2], "clip_qkv": None})
    return add_lora(transformers.OlmoForCausalLM(config), "llama")


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_unknown_family_gets_what_is_safe(unknown, kind):
    inputs = batch("llama", kind)
    loss, gradients = step(unknown, **inputs)
    report = pyfast.patch(unknown)
    assert {row.op for row in report.swapped} == {"attention", "lora_linear"}
    assert len(report.skipped) == 1
    assert "'olmo'" in report.skipped[0].reason
    got, gradients_got = step(unknown, **inputs)
    torch.testing.assert_close(got, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="olmo"):
        pyfast.patch(unknown, strict=True)
    assert _is_stock(unknown)


def test_sinks_of_an_unknown_family():
    """gpt-oss passes attention sinks (s_aux) and windows to its attention."""
    config = transformers.GptOssConfig(
        **{**CASES["llama"][2], "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5, "head_dim": 8}
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    inputs = batch("llama", "right")
    expected = model(**inputs).loss
    report = pyfast.patch(model)
    assert ("", "attention") in {row[:2] for row in report.swapped}
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("value_width", [6, 12])
def test_values_of_another_width(value_width):
    """DeepSeek's latent attention."""
    config = {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": value_width,
        "n_routed_experts": 4,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{**CASES["llama"][2], **config}))
    loss, gradients = step(model, **batch("llama", "right"))
    report = pyfast.patch(model)
    assert ("", "attention") in {row[:2] for row in report.swapped}
    got, gradients_got = step(model, **batch("llama", "right"))
    torch.testing.assert_close(got, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("T5ForConditionalGeneration", transformers.T5Config(**_ENCODER_DECODER, d_kv=8, d_ff=48, num_heads=4)),
        ("BartForConditionalGeneration", transformers.BartConfig(**_ENCODER_DECODER, encoder_ffn_dim=48)),
    ],
)
def test_encoder_and_decoder(cls, config):
    """Cross-attention, and T5's position bias, which gets a gradient."""
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).eval()
    inputs = batch("llama", "right")
    loss, gradients = step(model, **inputs)
    report = pyfast.patch(model)
    assert ("", "attention") in {row[:2] for row in report.swapped}
    got, gradients_got = step(model, **inputs)
    torch.testing.assert_close(got, loss)
    assert any("relative" in name for name in gradients) == cls.startswith("T5")
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_model_without_attention():
    config = transformers.MambaConfig(vocab_size=67, hidden_size=32, num_hidden_layers=1, state_size=4)
    report = pyfast.patch(transformers.MambaForCausalLM(config))
    assert report.swapped == []
    assert "does not take its attention" in report.skipped[0].reason


def test_attention_refuses_arguments_that_it_does_not_know():
    model = stock("llama")
    pyfast.patch(model, ops=["attention"])
    with pytest.raises(TypeError, match="block_indices"):
        model(**batch("llama"), block_indices=torch.zeros(1))


def test_attention_weights_cannot_be_asked_for():
    model = stock("llama")
    pyfast.patch(model)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch("llama"), output_attentions=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "DoraLinearVariant"), ({"target_modules": ["embed_tokens"]}, "PEFT's Embedding layer")],
)
def test_lora_that_has_no_kernel_runs_as_peft_has_it(options, reason):
    model = add_lora(stock("llama"), "llama", **options)
    loss, gradients = step(model, **batch("llama"))
    report = pyfast.patch(model)
    assert all(reason in row.reason for row in report.skipped)
    assert report.skipped
    got, gradients_got = step(model, **batch("llama"))
    torch.testing.assert_close(got, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-5, rtol=1e-4)


def test_an_activation_without_a_kernel_is_reported():
    config = transformers.LlamaConfig(**{**CASES["llama"][2], "hidden_act": "mish"})
    model = transformers.LlamaForCausalLM(config)
    expected = model(**batch("llama")).loss
    report = pyfast.patch(model)
    assert {row.reason for row in report.skipped} == {"its activation MishActivation has no kernel"}
    torch.testing.assert_close(model(**batch("llama")).loss, expected)


def test_the_fused_loss_is_refused_where_it_differs():
    """A subclass that scales its logits in a way that no row knows."""

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, **kwargs):
            labels, kwargs["labels"] = kwargs.pop("labels", None), None
            kwargs.pop("num_items_in_batch", None)
            out = super().forward(**kwargs)
            out.logits = out.logits / 2
            if labels is not None:
                out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
            return out

    Scaled.__name__ = "LlamaForCausalLM"
    model = Scaled(transformers.LlamaConfig(**CASES["llama"][2]))
    expected = model(**batch("llama")).loss
    report = pyfast.patch(model)
    assert "the fused loss is" in report.skipped[0].reason
    torch.testing.assert_close(model(**batch("llama")).loss, expected)


def test_norms_of_queries_by_head_stay_as_they_are():
    """Cohere's largest models norm each head with a weight of its own."""
    config = transformers.CohereConfig(**{**CASES["cohere"][2], "use_qk_norm": True})
    torch.manual_seed(0)
    model = transformers.CohereForCausalLM(config)
    loss, gradients = step(model, **batch("cohere"))
    report = pyfast.patch(model)
    assert len(report.skipped) == 4
    got, gradients_got = step(model, **batch("cohere"))
    torch.testing.assert_close(got, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-6, rtol=1e-4)


# ---- hooks


@pytest.mark.parametrize(
    "path",
    ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.0.mlp", "layers.1", "layers.1.input_layernorm"],
)
def test_hooks_still_see_their_module(path):
    model = stock("llama", adapter="lora")
    pyfast.patch(model)
    seen = []
    inner = model.get_base_model().model.get_submodule(path)
    handle = inner.register_forward_hook(lambda module, args, output: seen.append(output))
    _agree(model)
    assert len(seen) == 1
    handle.remove()
    inner.register_forward_hook(lambda module, args, output: output * 0 if torch.is_tensor(output) else output)
    assert not torch.allclose(model(**batch("llama")).loss, stock_step("llama", FP32, "lora", "full")[0])


@pytest.mark.parametrize(
    "path", ["encoder.layer.0.attention", "encoder.layer.0.intermediate", "encoder.layer.0.output"]
)
def test_hooks_on_modules_that_the_encoder_layer_bypasses(path):
    model = stock("bert-token", adapter="lora")
    pyfast.patch(model)
    seen = []
    model.get_base_model().bert.get_submodule(path).register_forward_hook(lambda *args: seen.append(1))
    _agree(model, "bert-token")
    assert seen == [1]


def test_hidden_states_are_recorded():
    model = stock("llama", adapter="lora")
    expected = model(**batch("llama"), output_hidden_states=True).hidden_states
    pyfast.patch(model)
    got = model(**batch("llama"), output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---- the causal language model's forward


def test_logits_where_they_are_wanted():
    model = stock("granite")
    inputs = batch("granite")
    expected = model(**inputs)
    pyfast.patch(model)
    assert model(**inputs).logits is None
    torch.testing.assert_close(model(**inputs, keep_logits=True).logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(inputs["input_ids"]).logits, expected.logits, atol=1e-5, rtol=1e-5)
    model.eval()
    out = model(**inputs)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss)
    pyfast.patch(model.train(), keep_logits=True)
    out = model(**inputs)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.parametrize(
    "extra",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))},
        {"ignore_index": 11},
        {"logits_to_keep": 5, "shift_labels": torch.full((2, 5), 9)},
    ],
    ids=lambda extra: "-".join(extra),
)
def test_arguments_of_the_loss(extra):
    model = stock("llama")
    inputs = {**batch("llama"), **extra}
    inputs["labels"] = inputs["labels"].clamp(min=0) if "ignore_index" in extra else inputs["labels"]
    expected = model(**inputs).loss
    pyfast.patch(model)
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_all_labels_ignored_is_as_stock():
    model = stock("llama")
    inputs = {**batch("llama"), "labels": torch.full((2, 12), -100)}
    assert model(**inputs).loss.isnan()
    pyfast.patch(model)
    assert model(**inputs).loss.isnan()


def test_a_loss_of_the_users_own_is_kept():
    model = stock("llama")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    expected = model(**batch("llama")).loss
    report = pyfast.patch(model)
    assert "a loss function of its own" in report.skipped[0].reason
    torch.testing.assert_close(model(**batch("llama")).loss, expected)
    pyfast.unpatch(model)
    assert model(**batch("llama")).loss == expected


def test_tuples_and_embeddings():
    model = stock("llama")
    inputs = batch("llama")
    expected = model(**inputs).loss
    pyfast.patch(model)
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).loss)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embeddings, labels=inputs["labels"]).loss, expected)
    torch.testing.assert_close(model(inputs["input_ids"], None, None, None, None, inputs["labels"]).loss, expected)


@pytest.mark.parametrize("case", CASES)
def test_signature_is_kept(case):
    """Trainer drops the columns that forward's signature does not have."""
    model = stock(case)
    before = inspect.signature(model.forward)
    pyfast.patch(model)
    assert inspect.signature(model.forward) == before


def test_accumulation_counts_items():
    """The loss of one batch of 8 is that of four of 2, each divided by the items of all."""
    model = stock("llama", adapter="head")
    pyfast.patch(model)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 60, (8, 12), generator=generator)
    labels = torch.where(torch.rand(8, 12, generator=generator) < 0.5, ids, -100)
    items = (labels[:, 1:] != -100).sum()
    loss, gradients = step(model, input_ids=ids, labels=labels, num_items_in_batch=items)
    model.zero_grad(set_to_none=True)
    total = 0
    for part in range(0, 8, 2):
        rows = slice(part, part + 2)
        part_loss = model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=items).loss
        part_loss.backward()
        total += part_loss.detach()
    torch.testing.assert_close(total, loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


# ---- training options


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "bert-token"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(case, reentrant):
    model = stock(case, adapter="lora")
    pyfast.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    layer = next(m for m in model.modules() if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer))
    inner = next(m for m in layer.modules() if type(m).__name__ == "Linear" and m is not layer)
    inner.register_forward_hook(lambda *args: runs.append(1))
    got = step(model, **batch(case))
    assert len(runs) == 2, "the layer did not run again in backward"
    assert_steps_agree(got, truth(case, FP32, "lora", "full"), stock_step(case, FP32, "lora", "full"), FP32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_replayed_and_unbiased(checkpointing):
    """One seed, one result and gradient, checkpointed or not; the mean over seeds is the result without dropout."""
    model = add_lora(stock("llama"), "llama", lora_dropout=0.5)
    pyfast.patch(model, strict=True)
    inputs = batch("llama")

    def run():
        torch.manual_seed(4)
        return step(model, **inputs)

    loss, gradients = run()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    again, gradients_again = run()
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=0, rtol=0)
    with torch.no_grad():
        losses = {model(**inputs).loss.item() for _ in range(4)}
        assert len(losses) == 4, "a mask was used twice"
        projection = model.get_base_model().model.layers[0].self_attn.q_proj
        x = torch.randn(1, 5, 32)
        mean = torch.stack([projection(x) for _ in range(3000)]).mean(0)
        torch.testing.assert_close(mean, projection.eval()(x), atol=0.05, rtol=0)


def test_joined_projections_drop_their_input_once():
    """Phi-3's gate and up are one LoRA layer, so that both see the same dropped input."""
    model = add_lora(stock("phi3"), "phi3", lora_dropout=0.5)
    pyfast.patch(model, strict=True)
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.activation_fn = nn.ReLU()
    joined, down = mlp.gate_up_proj, mlp.down_proj
    with torch.no_grad():
        joined.base_layer.weight.zero_()
        joined.lora_B["default"].weight[40:] = joined.lora_B["default"].weight[:40]
        down.base_layer.weight.fill_(1)
        down.lora_B["default"].weight.zero_()
    y = mlp(torch.randn(64, 32))  # relu(g) * u, and g is u
    assert y.max() > 0
    assert y.min() >= 0


@pytest.mark.parametrize(
    ("case", "option"),
    [
        ("llama", "attention_dropout"),
        ("phi3", "attention_dropout"),
        ("phi3", "resid_pdrop"),
        ("gpt2", "attn_pdrop"),
        ("gpt2", "resid_pdrop"),
        ("gpt2", "embd_pdrop"),
        ("bert-token", "attention_probs_dropout_prob"),
        ("bert-token", "hidden_dropout_prob"),
    ],
)
def test_every_dropout_of_the_family_is_there(case, option):
    """With a probability near 1 all is dropped, whatever the mask; without the dropout the loss is another."""
    cls, config_cls, config = CASES[case]
    torch.manual_seed(1)
    config = getattr(transformers, config_cls)(**{**config, option: 1 - 1e-7})
    model = getattr(transformers, cls)(config).train()
    inputs = batch(case)
    expected, gradients = step(model, **inputs)
    assert not torch.isclose(expected, model.eval()(**inputs).loss, rtol=1e-4)
    pyfast.patch(model.train(), strict=True)
    got, gradients_got = step(model, **inputs)
    torch.testing.assert_close(got, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-6, rtol=1e-4)


def test_dropout_of_hidden_states_is_swapped():
    config = {**CASES["bert-token"][2], "attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}
    model = transformers.BertForTokenClassification(transformers.BertConfig(**config)).train()
    model = add_lora(model, "bert-token", lora_dropout=0.1)
    report = pyfast.patch(model, strict=True)
    names = [row.module.removeprefix("base_model.model.") for row in report.swapped if row.op == "dropout"]
    inside = [f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in ("attention.output", "output")]
    assert sorted(names) == sorted(["dropout", *(f"{name}.dropout" for name in ["bert.embeddings", *inside])])
    module = model.get_submodule("base_model.model.bert.embeddings.dropout")
    x = torch.ones(200, 200)
    assert 0.18 < (module(x) == 0).float().mean() < 0.22
    assert torch.equal(module.eval()(x), x)


def test_attention_dropout_replays():
    config = {**CASES["bert-token"][2], "attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}
    model = transformers.BertForTokenClassification(transformers.BertConfig(**config)).train()
    pyfast.patch(model, strict=True)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(step(model, **batch("bert-token"))[0])
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    a, b = (model(**batch("bert-token")).loss for _ in range(2))
    assert a == b


def test_autocast():
    model = stock("llama", adapter="lora")
    inputs = batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        own = step(model, **inputs)
    pyfast.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, **inputs)
    assert_steps_agree(got, truth("llama", FP32, "lora", "full"), own, torch.bfloat16)


@pytest.mark.parametrize("case", ["llama", "bert-token"])
def test_compiled(case):
    model = stock(case, adapter="lora")
    pyfast.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = step(compiled, **batch(case, "right"))
    got = got[0], {name.removeprefix("_orig_mod."): gradient for name, gradient in got[1].items()}
    assert_steps_agree(got, truth(case, FP32, "lora", "right"), stock_step(case, FP32, "lora", "right"), FP32)


def test_second_step_after_the_optimizer():
    """Nothing is remembered of weights that change."""
    model, patched = stock("llama"), stock("llama")
    pyfast.patch(patched)
    inputs = batch("llama")
    for m in (model, patched):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for _ in range(3):
            loss, _ = step(m, **inputs)
            optimizer.step()
        m.last = loss
    torch.testing.assert_close(patched.last, model.last, atol=1e-5, rtol=1e-5)


# ---- adapters


def test_adapters_switched_disabled_and_mixed():
    model = stock("llama", adapter="lora")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    twin = copy.deepcopy(model)
    pyfast.patch(model)
    inputs = batch("llama")

    def same(**kwargs):
        torch.testing.assert_close(model(**inputs, **kwargs).loss, twin(**inputs, **kwargs).loss)
        return model(**inputs, **kwargs).loss

    losses = [same()]
    for m in (model, twin):
        m.set_adapter("other")
    losses.append(same())
    with model.disable_adapter(), twin.disable_adapter():
        losses.append(same())
    for m in (model, twin):
        m.base_model.set_adapter(["default", "other"])
    losses.append(same())
    assert len({round(loss.item(), 5) for loss in losses}) == 4
    for m in (model, twin):
        m.set_adapter("default")
        m.eval()
    same(adapter_names=["other", "default"])


@pytest.mark.parametrize("case", ["llama", "gpt2", "phi3", "bert-sequence"])
def test_save_reload_and_merge(case, tmp_path):
    model = stock(case, adapter="lora")
    inputs = batch(case)
    pyfast.patch(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, **inputs)
    optimizer.step()
    model.eval()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    base = stock(case)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert "pyfast" not in (tmp_path / "merged" / "config.json").read_text()
    cls = getattr(transformers, CASES[case][0])
    final = cls.from_pretrained(tmp_path / "merged")
    assert final.config.architectures == [CASES[case][0]]
    assert final.config._attn_implementation == "sdpa"
    torch.testing.assert_close(final(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
    pyfast.unpatch(merged)
    assert _is_stock(merged)


def test_merge_and_unmerge_in_place():
    model = stock("llama", adapter="lora").eval()
    pyfast.patch(model)
    inputs = batch("llama")
    expected = model(**inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_patched_model_saves_what_a_stock_one_loads(tmp_path):
    model = stock("llama").eval()
    pyfast.patch(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert _is_stock(loaded)
    inputs = batch("llama")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_a_whole_head_trained_beside_lora():
    """modules_to_save=["lm_head"]: the fused loss sees PEFT's copy of the head, and gives it a gradient."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(stock("llama"), config)
    loss, gradients = step(model, **batch("llama"))
    pyfast.patch(model, strict=True)
    assert model(**batch("llama")).logits is None
    got, gradients_got = step(model, **batch("llama"))
    torch.testing.assert_close(got, loss)
    assert any("lm_head" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_head_with_dropped_lora_keeps_its_logits():
    model = add_lora(stock("llama"), "llama", head=True, lora_dropout=0.2)
    report = pyfast.patch(model)
    assert [row.reason for row in report.skipped] == ["lm_head has LoRA with dropout: logits are held"]
    assert model(**batch("llama")).logits is not None


def test_tied_embeddings():
    config = transformers.LlamaConfig(**{**CASES["llama"][2], "tie_word_embeddings": True})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    loss, gradients = step(model, **batch("llama"))
    pyfast.patch(model, strict=True)
    got, gradients_got = step(model, **batch("llama"))
    torch.testing.assert_close(got, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_got[name], gradient, atol=1e-6, rtol=1e-4)


def test_auto_peft_model(tmp_path):
    stock("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    add_lora(base, "llama").save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    expected = model(**batch("llama")).loss
    pyfast.patch(model, strict=True)
    torch.testing.assert_close(model(**batch("llama")).loss, expected)
