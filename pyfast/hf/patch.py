"""pyfast.patch and pyfast.unpatch: the swap of one model instance, and the report of it."""

import copy
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from pyfast import dispatch
from pyfast.hf import attention, dropout, layer, lora, loss, mlp, norm, tokens
from pyfast.hf.families import FAMILIES, Family
from pyfast.hf.swap import get, stock_class, swap, unswap


class Swapped(NamedTuple):
    module: str
    op: str
    backend: str


class Skipped(NamedTuple):
    module: str
    reason: str


@dataclass
class PatchReport:
    """What `patch` did. Printed, it is a table in which the layers of a model share a row.

    swapped: (module, op, backend) for each op that now serves a module
    skipped: (module, reason) for each module that stays as it was
    passed_over: (op, backend, reason) for each faster backend that cannot serve the op here
    """

    model: str
    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    passed_over: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"PyFast in {self.model}: {len({row.module for row in self.swapped})} modules swapped"]
        lines += _table(("module", "op", "backend"), self.swapped)
        if self.skipped:
            lines += ["", "left as it was"]
            lines += _table(("module", "reason"), self.skipped)
        lines += [f"{op}: not {backend}, because {reason}" for op, backend, reason in self.passed_over]
        return "\n".join(lines)


def _table(heads: tuple[str, ...], rows: list[tuple]) -> list[str]:
    counts = Counter((re.sub(r"\.\d+(?=\.|$)", ".*", row[0]) or "(model)", *row[1:]) for row in rows)
    cells = [(*heads, ""), *((*row, f"×{count}" if count > 1 else "") for row, count in counts.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def patch(
    model: nn.Module, ops: str | Iterable[str] = "auto", strict: bool = False, *, keep_logits: bool = False
) -> PatchReport:
    """Swaps PyFast's ops into this model instance, in place. Nothing else in the process changes.

    model: a transformers model, or a PEFT model around one. It may be patched before or after PEFT wraps it: the
        projections of swapped layers are looked at anew at each call; patch it again to have all LoRA layers reported.
    ops: "auto" for all that the model can use, or the names of ops from pyfast.ops: a module is swapped where all the
        ops that it would use are among them.
    strict: raise RuntimeError, and leave the model as it was, where something asked for could not be swapped.
    keep_logits: also return logits in training. Without it the fused loss leaves them None when there are labels;
        in eval() they are always there. `model(..., keep_logits=True)` asks for them once.

    Patching again replaces the patch. `unpatch` undoes it. The state-dict's keys, `generate`, saving, merging and
    unloading adapters work as before.
    Raises TypeError for a thing that is not a model, ValueError for unknown ops.
    """
    _check_model(model)
    wanted = _wanted(ops)
    unpatch(model)
    root = _root(model)
    family = FAMILIES.get(root.config.model_type)
    session = _Session(model, family, wanted)
    session.attention()
    for name, module in model.named_modules():
        session.module(name, module)
    session.causal_lm(root, keep_logits)
    session.classifier(root)
    if family is None:
        session.skip(
            session.names[root],
            f"no row of pyfast/hf/families.py knows the model type {root.config.model_type!r}:"
            " its layers, MLPs, norms and loss stay as they are",
        )
    session.unused()
    report = session.report
    if strict and report.skipped:
        unpatch(model)
        reasons = "; ".join(f"{module or 'the model'}: {reason}" for module, reason in report.skipped)
        raise RuntimeError(
            f"pyfast.patch(strict=True): the model is unchanged, since not all could be swapped. {reasons}"
        )
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes `patch` exactly. A model that is not patched is left alone."""
    _check_model(model)
    for module in model.modules():
        unswap(module)
        state = module.__dict__
        if "_pyfast_attention" in state:
            module.config._attn_implementation_internal = state.pop("_pyfast_attention")
        if state.get("_loss_function") is loss.causal_lm_loss:
            del state["_loss_function"]
        state.pop("_pyfast_keep_logits", None)


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"pyfast.patch takes a transformers model or a PEFT model, not {type(model).__name__!r}:"
            " load one with AutoModel...from_pretrained first"
        )
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        raise TypeError(
            f"pyfast.patch takes a model that holds a transformers PreTrainedModel; {type(model).__name__} holds none"
        )


def _wanted(ops) -> frozenset[str] | None:
    """The ops asked for, None for all."""
    if ops == "auto":
        return None
    known = dispatch.TABLE
    names = frozenset([ops] if isinstance(ops, str) else ops)
    unknown = sorted(names - set(known))
    if unknown:
        raise ValueError(
            f"pyfast.patch: no op is called {', '.join(unknown)}; choose 'auto' or from {', '.join(known)}"
        )
    return names


def _root(model: nn.Module) -> PreTrainedModel:
    """The outermost transformers model."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _own_config(model: nn.Module, root: PreTrainedModel) -> None:
    """Gives the model a configuration of its own: another model made from the same object must not change with it."""
    old, new = [root.config], [copy.deepcopy(root.config)]
    copies = {}
    while old:
        a, b = old.pop(), new.pop()
        copies[id(a)] = b
        for key in a.sub_configs:
            if getattr(a, key, None) is not None:
                old.append(getattr(a, key))
                new.append(getattr(b, key))
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


class _Session:
    """One call of `patch`."""

    def __init__(self, model: nn.Module, family: Family | None, wanted: frozenset[str] | None):
        self.model, self.family, self.wanted = model, family, wanted
        self.root = _root(model)
        self.names = {module: name for name, module in model.named_modules()}
        self.report = PatchReport(type(self.root).__name__)
        self.parameter = next(model.parameters(), torch.empty(0))

    def asks(self, *ops: str) -> bool:
        return self.wanted is None or self.wanted.issuperset(ops)

    def skip(self, name: str, reason: str) -> None:
        self.report.skipped.append(Skipped(name, reason))

    def served(self, name: str, *ops: str) -> None:
        for op in ops:
            backend, passed_over = dispatch.explain(op, self.parameter)
            self.report.swapped.append(Swapped(name, op, backend))
            for better, reason in passed_over:
                if (op, better, reason) not in self.report.passed_over:
                    self.report.passed_over.append((op, better, reason))

    def attention(self) -> None:
        """The implementation "pyfast" in the model's configuration: its masks, and the attention of unknown modules."""
        if not self.asks("attention"):
            return
        attention.register()
        _own_config(self.model, self.root)
        before = {
            module: module.config._attn_implementation
            for module in self.root.modules()
            if isinstance(module, PreTrainedModel)
        }
        backends = ("_supports_sdpa", "_supports_flash_attn", "_supports_attention_backend")
        if self.root._can_set_attn_implementation() and any(getattr(self.root, name, False) for name in backends):
            self.root.set_attn_implementation(attention.IMPLEMENTATION)
        for module, implementation in before.items():
            if module.config._attn_implementation == attention.IMPLEMENTATION:
                module._pyfast_attention = implementation
        name = self.names[self.root]
        if self.root.config._attn_implementation != attention.IMPLEMENTATION:
            self.skip(name, f"{type(self.root).__name__} does not take its attention from transformers' registry")
        elif self.family is None:
            self.served(name, "attention")

    def unused(self) -> None:
        """Reports the ops that were asked for and serve nothing."""
        used = {row.op for row in self.report.swapped}
        if self.root.config._attn_implementation == attention.IMPLEMENTATION:
            used |= {"attention", "attention_varlen"}
        for op in sorted((self.wanted or frozenset()) - used):
            self.skip(self.names[self.root], f"{op} was asked for, but no module uses it with only the ops asked for")

    def module(self, name: str, module: nn.Module) -> None:
        """Swaps the module if it is of a kind that the family's row, or PEFT, names."""
        if isinstance(module, LoraLayer):
            self._lora(name, module)
            return
        if self.family is None:
            return
        family, cls = self.family, type(module).__name__
        gated = ("lora_mlp",)
        if cls == family.class_name("norm"):
            self._swap(name, module, norm.norm_forward, (family.norm_op,), norm.refusal(module))
        elif cls == family.class_name("mlp"):
            self._swap(name, module, mlp.mlp_forward, gated, mlp.refusal(module, family))
        elif cls == family.class_name("attention"):
            if self.root.config._attn_implementation != attention.IMPLEMENTATION:
                return
            rope = ("rope",) if family.rope else ()
            projections = ("lora_linear",) if len(family.qkv) == 1 else ("lora_linears",)
            self._swap(name, module, attention.attention_forward, ("attention", *rope, *projections))
        elif type(module) is nn.Dropout:
            if module.p and not self._is_inside_an_op(name):
                self._swap(name, module, dropout.dropout_forward, ("dropout",))
        elif cls == family.class_name("layer"):
            inside = ("lora_linear", "lora_mlp") if family.order == "post" else ()
            reason = layer.refusal(module, family)
            if reason is None and family.feed_forward is None:
                reason = mlp.refusal(module, family)
            self._swap(name, module, layer.layer_forward, (family.norm_op, *inside), reason)

    def _is_inside_an_op(self, dropout_name: str) -> bool:
        """Whether this dropout is the attention's own or a LoRA layer's, which their ops apply."""
        parent, _, attribute = dropout_name.rpartition(".")
        parent = self.model.get_submodule(parent)
        is_attention = stock_class(parent).__name__ == self.family.class_name("attention")
        return "lora_dropout" in dropout_name or (is_attention and attribute == self.family.attention_dropout)

    def _swap(self, name, module, run, ops, reason=None) -> None:
        if not self.asks(*ops):
            return
        if "forward" in module.__dict__:
            reason = "another library has given it a forward of its own"
        if reason is not None:
            self.skip(name, reason)
            return
        swap(module, run, self.family)
        self.served(name, *ops)

    def _lora(self, name: str, module: LoraLayer) -> None:
        if not self.asks("lora_linear"):
            return
        if type(module) is not LoraLinear:
            self.skip(name, f"PEFT's {type(module).__name__} layer has no kernel")
            return
        reason = lora.refusal(module)
        if reason is not None:
            self.skip(name, f"PEFT's own forward is called: {reason}")
        if "forward" in module.__dict__:
            self.skip(name, "another library has given it a forward of its own")
            return
        # swapped all the same: adapters may be merged, disabled or switched later, and are looked at at each call
        swap(module, lora.lora_forward, None)
        if reason is None:
            self.served(name, "lora_linear")

    def classifier(self, root: PreTrainedModel) -> None:
        """A sequence classifier's layers need not compute padding."""
        if self.family is not None and stock_class(root).__name__ == self.family.class_name("classifier"):
            self._swap(self.names[root], root, tokens.classification_forward, ("attention_varlen",))

    def causal_lm(self, root: PreTrainedModel, keep_logits: bool) -> None:
        """The loss of a causal language model."""
        family = self.family
        if family is None or stock_class(root).__name__ != family.class_name("causal_lm"):
            return
        name = self.names[root]
        if not loss.own_loss(root):
            if self.asks("cross_entropy") or self.asks("linear_cross_entropy"):
                self.skip(name, "it has a loss function of its own")
            return
        if self.asks("cross_entropy"):
            root.loss_function = loss.causal_lm_loss
            self.served(name, "cross_entropy")
        if not self.asks("linear_cross_entropy"):
            return
        head = lora.weights(get(root, family.lm_head))
        if head is None:
            reason = f"{family.lm_head} must be called as the module it is: logits are held"
        elif head[1]:
            reason = f"{family.lm_head} has LoRA with dropout: logits are held"
        else:
            reason = loss.difference(root, family)
        root._pyfast_keep_logits = keep_logits
        self._swap(name, root, loss.causal_lm_forward, ("linear_cross_entropy",), reason)
