"""--memory-budget: recompute as few layers in the backward as a budget asks for.

A layer that is recomputed keeps its input only, and costs one more forward of itself (Chen et al., "Training Deep
Nets with Sublinear Memory Cost", 2016). The ops already recompute what is cheap: activations, dropout masks and
attention weights are never kept. What a step keeps is linear in its tokens, so that it is measured on one row.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from .callbacks import memory_mb
from .config import InputError

ADAM_MOMENTS = 2
SCRATCH = 128 * 2**20  # bytes that kernels take beside tensors, and
SLACK = 1.1  # what the allocator takes over the tensors' bytes; measured on Llamas of 90 million parameters
M_MMAP_THRESHOLD = -3  # glibc's malloc.h: from this size on, memory is mapped apart


class Allocated(TorchDispatchMode):
    """Bytes of the tensors made inside: those that live now, and the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.unseen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in given:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.unseen += storage.nbytes()
        if self.unseen > self.peak // 16:  # looking at every storage after every operation would take seconds
            self.living()
        return result

    def living(self) -> int:
        self.storages = {key: pair for key, pair in self.storages.items() if not pair[0].expired()}
        living = sum(size for _, size in self.storages.values())
        self.peak, self.unseen = max(self.peak, living), 0
        return living


class Need(NamedTuple):
    """Bytes of a step: what it keeps for its backward, and what it holds beyond that at its peak."""

    kept: int
    passing: int


def measure(trainer: Trainer, batch: dict[str, torch.Tensor]) -> Need:
    """One forward and backward, which leave nothing behind."""
    model = trainer.model.train()
    with torch.random.fork_rng(), Allocated() as allocated:
        with trainer.compute_loss_context_manager():
            loss = model(**batch).loss
        kept = allocated.living()
        loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return Need(kept, max(0, allocated.peak - kept - gradients))


def recompute(model: nn.Module, count: int) -> None:
    """Has the first `count` layers recomputed in the backward, and no other."""
    if count:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    for index, layer in enumerate(_layers(model)):
        layer.gradient_checkpointing = index < count


def return_freed_memory() -> None:
    """Has glibc give memory back as soon as it is freed, where it would keep what lies below other data in its heap.

    Without it a step that needs 1.6 GB was seen to hold 3.1.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)
        libc.malloc_trim(0)


def _layers(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def keep_to_budget(trainer: Trainer, budget: int) -> str:
    """Has as few layers recomputed as keep the trainer's steps within `budget` bytes, and says how many those are.

    Counted are this process as it is, gradients and AdamW's moments of what is trained, and one batch of the longest
    training row. Raises InputError where recomputing every layer is not enough.
    """
    return_freed_memory()
    model, rows, args = trainer.model, trainer.train_dataset, trainer.args
    layers = len(_layers(model))
    if not layers:
        raise InputError(f"--memory_budget: {type(model).__name__} has no layers that transformers can recompute")
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    length, size = len(longest["input_ids"]), args.per_device_train_batch_size
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    fixed = int(memory_mb() * 2**20) + SCRATCH + trained * (1 + ADAM_MOMENTS)
    batch = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in trainer.data_collator([longest]).items()
    }
    recompute(model, layers)
    least = measure(trainer, batch)
    recompute(model, 0)
    most = measure(trainer, batch)

    def need(count):
        kept = most.kept - (most.kept - least.kept) * count / layers
        return fixed + SLACK * size * (kept + (least if count else most).passing)

    fitting = [count for count in range(layers + 1) if need(count) <= budget]
    if not fitting:
        raise InputError(
            f"--memory_budget {budget / 1e9:.2f} GB: a step of {size} x {length} tokens needs about"
            f" {need(layers) / 1e9:.2f} GB with every layer recomputed; lower --per_device_train_batch_size or"
            " --max_length"
        )
    recompute(model, fitting[0])
    return (
        f"memory budget: {fitting[0]} of {layers} layers are recomputed in the backward; a step of {size} x {length}"
        f" tokens needs about {need(fitting[0]) / 1e9:.2f} GB of {budget / 1e9:.2f} GB"
    )
