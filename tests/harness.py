"""Runs one public op on a backend and holds its results and every gradient against reference and PyTorch."""

import torch
from close import assert_close
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import pyfast
from pyfast import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (backend, arch): every way in which a kernel can run on this machine; arch None is the backend's best
KERNELS = [("cpu", None), ("cpu", "avx2"), ("cpu", "avx512")]


def available(backend: str, arch: str | None) -> str | None:
    """Why this machine cannot run (backend, arch), or None."""
    reason = dispatch.unavailable(backend)
    if reason is None and arch is not None:
        try:
            with pyfast.use_backend(backend, arch=arch):
                pass
        except ValueError as error:
            reason = str(error)
    return reason


def run(op, args, kwargs=None, backend=None, arch=None, cotangents=None):
    """Returns (outputs, gradients of every floating input that requires grad, cotangents used).

    args, kwargs: nested arguments of the public op; floating tensors that require grad are taken as fresh leaves.
    """
    leaves, tree = tree_flatten((tuple(args), kwargs or {}))
    leaves = [
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
        if torch.is_tensor(x)
        else x
        for x in leaves
    ]
    args, kwargs = tree_unflatten(leaves, tree)
    with pyfast.use_backend(backend, arch=arch):
        outputs = op(*args, **kwargs)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        if cotangents is None:
            generator = torch.Generator("cpu").manual_seed(7)
            cotangents = [torch.randn(y.shape, generator=generator, device="cpu").to(y) for y in outputs]
        wanted = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
        total = [(y, c.to(y.dtype)) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
        gradients = ()
        if total and wanted:
            gradients = torch.autograd.grad([y for y, _ in total], wanted, [c for _, c in total])
    return [y.detach() for y in outputs], list(gradients), cotangents


def run_reference(op, args, kwargs, cotangents):
    """Outputs and gradients of the reference in fp64."""

    def to_fp64(x):
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    args, kwargs = tree_map_only(torch.Tensor, to_fp64, (tuple(args), kwargs or {}))
    return run(op, args, kwargs, "reference", None, [c.double() for c in cotangents])[:2]


def check(op, args, kwargs=None, backend="cpu", arch=None, cotangents=None):
    """Asserts the error rule for every output and every gradient of op(*args, **kwargs)."""
    outputs, gradients, cotangents = run(op, args, kwargs, backend, arch, cotangents)

    truth, truth_gradients = run_reference(op, args, kwargs, cotangents)
    own, own_gradients, _ = run(op, args, kwargs, "torch", None, cotangents)
    for i, (k, ref, t) in enumerate(zip(outputs, truth, own, strict=True)):
        assert_close(k, ref, t, f"output {i}")
    for i, (k, ref, t) in enumerate(zip(gradients, truth_gradients, own_gradients, strict=True)):
        assert k.dtype == t.dtype, f"gradient {i} has dtype {k.dtype}, PyTorch's {t.dtype}"
        assert_close(k, ref, t, f"gradient {i}")


def check_shape(op, args, kwargs=None, backend="cpu", arch=None):
    """For fp32 shapes so small that PyTorch's own error may be zero by chance: every output and gradient is within
    1e-5 of the largest element, some 100 roundings, or, where it is what is left of larger terms (p - 1, for one),
    within 1e-6 of the largest cotangent. `check` on larger shapes is the measure of accuracy."""
    outputs, gradients, cotangents = run(op, args, kwargs, backend, arch)
    truth, truth_gradients = run_reference(op, args, kwargs, cotangents)
    rest = 1e-6 * max((float(c.abs().max()) for c in cotangents if c.numel()), default=0.0)
    for k, ref in zip(outputs + gradients, truth + truth_gradients, strict=True):
        atol = max(1e-5 * float(ref.abs().max()), rest) if ref.numel() else 0.0
        torch.testing.assert_close(k.double(), ref, rtol=0, atol=atol)
