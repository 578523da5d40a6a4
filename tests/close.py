"""The error rule: how far a kernel's result may be from the truth.

`k` is the kernel's result, `ref` the same in fp64, `torch_result` PyTorch's own in the kernel's dtype, u that dtype's
unit roundoff. Elementwise:        max|k - ref| <= 2 max|torch - ref| + u max|ref|
and per row and per column of 16 elements or more, so that a few wrong ones cannot hide:
                              ||k - ref|| <= 2 worst||torch - ref|| + 2u ||ref|| + u worst||ref||
the worst over all rows (columns). The first is FlashAttention's rule; the second is ours.
"""

import torch


def assert_close(k: torch.Tensor, ref: torch.Tensor, torch_result: torch.Tensor, name: str = "result") -> None:
    assert k.shape == ref.shape == torch_result.shape, f"{name}: shapes {k.shape}, {ref.shape}, {torch_result.shape}"
    assert ref.dtype == torch.float64, f"{name}: the reference must be fp64, not {ref.dtype}"
    if k.numel() == 0:
        return
    u = torch.finfo(k.dtype).eps / 2
    k, t = k.detach().double(), torch_result.detach().double()
    ref = ref.detach()
    for label, value in (("result", k), ("reference", ref), ("PyTorch's result", t)):
        same = torch.isfinite(value) == torch.isfinite(ref)
        assert same.all(), f"{name}: {label} is not finite at {int((~same).sum())} places where the reference is"
    finite = torch.isfinite(ref)
    assert torch.equal(k[~finite].nan_to_num(nan=7.0), ref[~finite].nan_to_num(nan=7.0)), f"{name}: infinities differ"
    zero = torch.zeros((), dtype=torch.float64, device=ref.device)
    k, t, ref = (torch.where(finite, value, zero) for value in (k, t, ref))
    error, allowed = (k - ref).abs().max(), 2 * (t - ref).abs().max() + u * ref.abs().max()
    assert error <= allowed, (
        f"{name}: max error {error:.3e} > {allowed:.3e} (PyTorch's own {(t - ref).abs().max():.3e})"
    )
    lines = [("row", (k if k.dim() else k[None])), ("column", k.reshape(-1, k.shape[-1]).T if k.dim() > 1 else None)]
    for kind, lines_k in lines:
        if lines_k is None or lines_k.shape[-1] < 16:
            continue

        def shaped(x, kind=kind):
            return (x.reshape(-1, x.shape[-1]).T if kind == "column" else x).double()

        d = (shaped(k) - shaped(ref)).norm(dim=-1)
        d_torch, size = (shaped(t) - shaped(ref)).norm(dim=-1).max(), shaped(ref).norm(dim=-1)
        bound = 2 * d_torch + 2 * u * size + u * size.max()
        assert (d <= bound).all(), (
            f"{name}: {kind} {int((d - bound).argmax())} of {d.numel()} is off by {float((d - bound).max()):.3e} beyond"
            f" the bound in norm ({int((d > bound).sum())} {kind}s are)"
        )
