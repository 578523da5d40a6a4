"""Every kernel's schema and fake, on one page.

A schema is defined once per backend namespace (pyfast_cpu, ...): two backends on one dispatch key would silently
replace each other. A fake computes the shapes, dtypes and strides of the results, for torch.compile. Kernels take
contiguous tensors unless their comment says otherwise, and change none of their inputs.
"""

import torch

from pyfast import dispatch

_LIBRARIES = {
    namespace: torch.library.Library(namespace, "DEF") for namespace, _ in dispatch.BACKENDS.values() if namespace
}


def kernel(schema: str):
    """Defines `schema` in every backend's namespace, with the decorated function as its fake."""

    def define(fake):
        for namespace, library in _LIBRARIES.items():
            library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{namespace}::{schema.split('(')[0]}", fake, lib=library)
        return fake

    return define


_LIBRARIES["pyfast_cpu"].define("get_isa() -> str")
_LIBRARIES["pyfast_cpu"].define("set_isa(str name) -> ()")


# ---- activations: any shape, elementwise
@kernel("swiglu(Tensor gate, Tensor up) -> Tensor")
def _(gate, up):
    return torch.empty_like(gate)


@kernel("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _(dy, gate, up):
    return torch.empty_like(gate), torch.empty_like(up)


# ---- dropout: the factor, 0 or 1 / (1 - p), of each logical element index from begin on
@kernel("dropout_factors(Tensor seed, SymInt begin, SymInt count, float p) -> Tensor")
def _(seed, begin, count, p):
    return seed.new_empty((count,), dtype=torch.float32)


_reason = dispatch._load_native()
if _reason is not None:
    dispatch._UNAVAILABLE["cpu"] = _reason
