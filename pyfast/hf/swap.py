"""How a module is swapped: its class becomes a subclass of its class with another `forward`.

The undo state is the class itself, so that deepcopy, pickling and `isinstance` work, no state-dict key changes, and
gradient checkpointing, hooks and whatever else wraps a module's call stay where they are.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from pyfast.hf.families import Family

PLAIN_TENSORS = (nn.Parameter, torch.Tensor)  # neither sharded (DTensor) nor quantized


def get(module: nn.Module, path: str | None, default=None):
    """The attribute at `path`, `default` where the path is None."""
    if path is None:
        return default
    for name in path.split("."):
        module = getattr(module, name)
    return module


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is the same as calling its class's forward: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was swapped."""
    return vars(type(module)).get("_pyfast_stock", type(module))


def swapped_as(module: nn.Module, run: Callable) -> bool:
    """Whether `run` is the module's forward."""
    return getattr(type(module), "_pyfast_run", None) is run


@functools.cache
def swapped_class(stock: type[nn.Module], run: Callable, family: Family | None) -> type[nn.Module]:
    """A subclass of `stock` whose forward calls `run(self, family, stock, **arguments)`.

    It bears the name, module and signature of `stock`: Trainer drops the columns that a model's signature does not
    have, and transformers keys registries and saved configurations by class names.
    """
    parameters = list(inspect.signature(stock.forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        # a wrapper (accelerate's autocast) may still hold this forward after the module was unpatched
        if len(args) > len(names) or not isinstance(self, cls):
            return stock.forward(self, *args, **kwargs)
        return run(self, family, stock, **dict(zip(names, args, strict=False)), **kwargs)

    def reduce(self, protocol):
        _, _, *state = super(cls, self).__reduce_ex__(max(protocol, 2))
        return (_new, (stock, run, family), *state)

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_pyfast_stock": stock,
        "_pyfast_run": staticmethod(run),
        "_pyfast_family": family,
    }
    cls = type(stock.__name__, (stock,), body)
    return cls


def _new(stock, run, family):
    """An empty swapped module, for pickle and copy to fill."""
    cls = swapped_class(stock, run, family)
    return cls.__new__(cls)


def swap(module: nn.Module, run: Callable, family: Family | None) -> None:
    module.__class__ = swapped_class(stock_class(module), run, family)


def unswap(module: nn.Module) -> None:
    module.__class__ = stock_class(module)
