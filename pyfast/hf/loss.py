"""The causal language model's loss: head and cross-entropy in one op, so that logits are never held."""

import torch
from torch import nn
from transformers import modeling_outputs
from transformers.loss.loss_utils import ForCausalLMLoss

from pyfast import ops
from pyfast.hf import attention
from pyfast.hf.families import Family
from pyfast.hf.lora import weights
from pyfast.hf.swap import get, stock_class
from pyfast.hf.tokens import tokens


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """transformers' ForCausalLMLoss without its fp32 copy of the logits; for where they are kept."""
    target = _target(labels, shift_labels, ignore_index, logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.cross_entropy(logits.view(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _target(labels, shift_labels, ignore_index, device):
    """(rows,): the token after each token."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1).to(device)


def own_loss(model: nn.Module) -> bool:
    """Whether the model computes transformers' loss for causal language models, and no other."""
    return model.loss_function in (ForCausalLMLoss, causal_lm_loss)


def causal_lm_forward(self, family: Family, stock, **kwargs):
    """The generic forward of a causal language model: with labels, in training, logits are None.

    The stock forward runs without labels, in eval(), with keep_logits=True, and where the fused loss cannot stand for
    it: logits_to_keep, a loss function of the user's own, or a head that must be called as the module it is.
    """
    keep_logits = kwargs.pop("keep_logits", self.__dict__.get("_pyfast_keep_logits", False))
    labelled = kwargs.get("labels") is not None
    if labelled and kwargs.get("use_cache") is None:
        # a loss needs no cache, and transformers looks for packed sequences only where there is none
        kwargs["use_cache"] = False
    fused = labelled and self.training and not keep_logits
    to_keep = kwargs.get("logits_to_keep", 0)
    if not fused or not isinstance(to_keep, int) or to_keep != 0 or not own_loss(self):
        return stock.forward(self, **kwargs)
    served = weights(get(self, family.lm_head))
    if served is None or served[1]:
        return stock.forward(self, **kwargs)
    kwargs.pop("logits_to_keep", None)
    return_dict = kwargs.pop("return_dict", None)
    return_dict = self.config.return_dict if return_dict is None else return_dict
    arguments = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
    ignore_index = kwargs.pop("ignore_index", -100)
    target = _target(arguments["labels"], arguments["shift_labels"], ignore_index, arguments["labels"].device)
    chosen = tokens(self, family, kwargs, (target != ignore_index).view(arguments["labels"].shape))
    kwargs = attention.without_mask(self, kwargs) if chosen is None else {**kwargs, "tokens": chosen}
    outputs = getattr(self, self.base_model_prefix)(**kwargs)
    hidden = outputs.last_hidden_state
    head, _ = served
    loss = ops.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        target.to(hidden.device),
        linear_bias=head.bias,
        lora_A=head.lora_A,
        lora_B=head.lora_B,
        scaling=head.scaling,
        ignore_index=ignore_index,
        softcap=get(self, family.logit_softcap),
        logit_scale=get(self, family.logit_scale, 1.0) / get(self, family.logit_divisor, 1.0),
        num_items_in_batch=arguments["num_items_in_batch"],
    )
    output = getattr(modeling_outputs, family.output)
    kept = ("past_key_values", "hidden_states", "attentions", "cross_attentions")
    outputs = output(loss=loss, **{name: outputs[name] for name in kept if name in outputs})
    return outputs if return_dict else outputs.to_tuple()


class _Backbone(nn.Module):
    """Stands for a model's backbone: gives the hidden states that it was made with."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args, **kwargs):
        return modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


@torch.no_grad()
def difference(model: nn.Module, family: Family) -> str | None:
    """How the fused loss differs from the stock one on random hidden states, or None where they agree.

    Only head and loss run. The hidden states are scaled so that the stock logits spread by 4: the loss then depends
    on every scale and cap that the head applies.
    """
    head = get(model, family.lm_head)
    served = weights(head)
    if served is None or served[0].weight.device.type == "meta":
        return None
    weight = served[0].weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    target = torch.randint(weight.shape[0], (2, 16), generator=generator).to(weight.device)
    stock = stock_class(model)

    def run(forward, hidden, **arguments):
        prefix, training = model.base_model_prefix, model.training
        backbone = model._modules[prefix]
        model._modules[prefix] = _Backbone(hidden)
        model.training = True
        try:
            return forward(model, input_ids=target, return_dict=True, **arguments)
        finally:
            model._modules[prefix], model.training = backbone, training

    spread = run(stock.forward, hidden).logits.float().std()
    hidden = (hidden * (4 / spread)).to(weight.dtype)
    logits = run(stock.forward, hidden).logits
    labels = torch.where(torch.arange(16, device=target.device) % 2 == 0, target, logits.argmax(-1).roll(1, -1))
    labels[:, :2] = -100
    expected = run(stock.forward, hidden, labels=labels, num_items_in_batch=11).loss
    if served[1]:  # dropout on the head: the fused forward would step aside
        return None
    got = run(
        lambda model, **kwargs: causal_lm_forward(model, family, stock, **kwargs),
        hidden,
        labels=labels,
        num_items_in_batch=11,
    ).loss
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.isclose(got, expected, rtol=tolerance, atol=tolerance):
        return f"the fused loss is {got.item():.4f} where the model's own is {expected.item():.4f}"
    return None
