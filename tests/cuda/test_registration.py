"""The CUDA kernels behind the public ops: chosen only where they should be, and understood by torch.compile."""

import re
import shutil
import subprocess
from pathlib import Path

import calls
import pytest
import torch
from calls import batched, cu_k, cu_q, kv, packed, packed_kv, packed_q, q, seed, target, x
from harness import run

import pyfast
from pyfast import dispatch, doctor, emulator
from pyfast.ops import (
    LoraWeights,
    QuantizedWeight,
    cross_entropy,
    linear_cross_entropy,
    lora_linear,
    lora_mlp,
    swiglu,
)

hidden, head, bias, A, B = torch.randn(5, 6), torch.randn(33, 6), torch.randn(33), torch.randn(2, 6), torch.randn(33, 2)
upstream, numbers = torch.rand(5, 2, dtype=torch.float64), (0.5, -100, 0.1, 2.0, 0.5, 1000)
rows, wide = torch.randn(5, 9), torch.randn(7, 9)
# two projections, of which one has an adapter and a bias, and the one that leads down in an MLP
lora = ([wide, wide], [torch.randn(3, 9), None], [torch.randn(7, 3), None], [2.0, 1.0], [torch.randn(7), None])
dropping = (0.5, [seed, None])
down = ([torch.randn(9, 7)], [torch.randn(2, 7)], [torch.randn(9, 2)], [1.0], [None])
mlp = (*(a + b for a, b in zip(lora, down, strict=True)), 0.5, [seed, None, seed], "silu")
products, h = [torch.randn(5, 7)] * 2, torch.randn(5, 3)
wanted = [True, False, True, True, True, True, False, False, False]

#: schema -> arguments of a few calls
CALLS = calls.CALLS | {
    "lora_linears": [(rows, *lora, *dropping)],
    "lora_linears_backward": [(products, rows, h, *lora, *dropping, wanted)],
    "lora_mlp": [(rows, *mlp)],
    "lora_mlp_backward": [
        (rows, rows, products, h, torch.randn(5, 2), *mlp, [*wanted, True, True, True, False]),
    ],
    "dequantize": [
        (torch.randint(256, (6, 8)).byte(), torch.ones(6), [0.5] * 256, 6, 8, 1, 8, torch.bfloat16),
        (torch.randint(256, (6, 4)).byte(), torch.ones(6), [0.5] * 16, 6, 8, 1, 8, torch.float32),
    ],
    "quantized_linear": [
        (rows.half(), None, torch.randint(256, (7, 9)).byte(), torch.ones(7), [0.5] * 256, 7, 9, 1, 9),
    ],
    "linear_cross_entropy": [
        (hidden, head, None, None, None, target, None, None, *numbers, [True] * 5),
        (hidden, head, bias, A, B, target, torch.rand(33), upstream, *numbers, [True] * 5),
        (hidden, head, None, A, B, target, None, upstream, *numbers, [True, False, True, False, True]),
    ],
}


@pytest.fixture(autouse=True)
def emulated():
    reason = dispatch.unavailable("emulator")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, fake, and no input changed or aliased."""
    for call in CALLS[name]:
        torch.library.opcheck(getattr(torch.ops.pyfast_emu, name).default, call)


def test_never_chosen_by_itself():
    """The emulator; and on a GPU only after what was measured there."""
    for op, row in dispatch.TABLE.items():
        assert "emulator" not in sum(row.values(), ()) and "cuda" not in row["cpu"]
        assert "cuda" not in row.get("cuda", ())[:-1]
        assert dispatch.choose(op, torch.randn(3)) not in ("cuda", "emulator")


def test_refuses_what_it_does_not_serve():
    with pyfast.use_backend("emulator"):
        with pytest.raises(ValueError, match="'emulator' was asked for, but it has no kernel for this op"):
            swiglu(torch.randn(3), torch.randn(3))
        with pytest.raises(ValueError, match="kernels serve float32, bfloat16 and float16"):
            cross_entropy(torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))


def test_a_kernel_checks_its_arguments():
    """A direct call never reads out of bounds."""
    call = torch.ops.pyfast_emu.cross_entropy
    for bad in (target[:4], target.int(), torch.stack([target] * 2, -1)[:, 0]):
        with pytest.raises(RuntimeError, match="target"):
            call(x, bad, None, None, -100, 0.0, None)
    with pytest.raises(RuntimeError, match=r"weight has shape \(32\), expected \(classes\)"):
        call(x, target, torch.rand(32), None, -100, 0.0, None)
    with pytest.raises(RuntimeError, match="upstream has another dtype"):
        call(x, target, None, torch.rand(5, 2), -100, 0.0, None)
    head_loss = torch.ops.pyfast_emu.linear_cross_entropy
    options = (None, None, *numbers, [True] * 5)
    with pytest.raises(RuntimeError, match="linear_weight has shape"):
        head_loss(hidden, head[:, :-1], None, None, None, target, *options)
    with pytest.raises(RuntimeError, match="lora_A and lora_B go together"):
        head_loss(hidden, head, None, A, None, target, *options)
    with pytest.raises(RuntimeError, match="lora_B"):
        head_loss(hidden, head, None, A, B[:-1], target, *options)
    with pytest.raises(RuntimeError, match="target must be int64"):
        head_loss(hidden, head, None, None, None, target.int(), *options)
    attend = torch.ops.pyfast_emu.attention
    with pytest.raises(RuntimeError, match="D is 300: the CUDA kernels serve 1 to 256"):
        attend(*[torch.randn(1, 1, 3, 300)] * 3, *[None] * 6, 0, 1.0, 0.0, -1, -1, 0.0)
    with pytest.raises(RuntimeError, match="cu_seqlens_k has shape"):
        attend(packed_q, packed_kv, packed_kv, *packed[:5], cu_k[:2], *packed[6:])
    with pytest.raises(RuntimeError, match=r"B has shape \(7, 2\), expected \(n, r\)"):
        torch.ops.pyfast_emu.lora_linears(rows, *lora[:2], [torch.randn(7, 2), None], *lora[3:], *dropping)
    with pytest.raises(RuntimeError, match="an input of a wanted gradient is missing"):
        torch.ops.pyfast_emu.lora_linears_backward(products, rows, None, *lora, *dropping, wanted)
    with pytest.raises(RuntimeError, match="hidden and wanted do not fit"):
        torch.ops.pyfast_emu.lora_mlp_backward(rows, rows, [], h, None, *mlp, [*wanted, True, True, True, False])
    with pytest.raises(RuntimeError, match="do not fit an"):
        torch.ops.pyfast_emu.dequantize(rows.byte(), torch.ones(5), [0.5] * 256, 5, 8, 1, 8, torch.float32)
    with pytest.raises(RuntimeError, match="at most 32 rows"):
        codes = (torch.zeros(7, 9).byte(), torch.ones(7), [0.5] * 256, 7, 9, 1, 9)
        torch.ops.pyfast_emu.quantized_linear(torch.zeros(33, 9).half(), None, *codes)
    with pytest.raises(RuntimeError, match="attention_mask has shape"):
        attend(q, kv, kv, None, batched[1][:, :-1], *batched[2:])


@pytest.mark.parametrize("bad", [[0, 4, 13], [0, 9, 4], [3, 2, 1], [-5, 4, 12], [2**40, 0, 12]])
def test_wrong_cu_seqlens_read_nothing_outside(bad):
    """On a GPU their values are not checked on the host; under AddressSanitizer a stray read would show."""
    call = (packed_q, packed_kv, packed_kv, *packed[:4], cu_q, torch.tensor(bad), *packed[6:])
    torch.ops.pyfast_emu.attention(*call)


@pytest.mark.parametrize("op", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, op):
    """fullgraph=True traces through the kernels' fakes; forward and backward are eager's."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, classes in ((4, 20), (7, 31)):
        args = [torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))]
        if op is linear_cross_entropy:
            args = [torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True), args[1]]
        eager = run(op, args, backend="emulator")
        torch.testing.assert_close(run(compiled, args, backend="emulator")[:2], eager[:2], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_lora(dynamic):
    """Layers with dropout and with a quantised weight, of few rows and of more, in one graph."""
    weight = QuantizedWeight.quantize(torch.randn(8, 64), "nf4")
    p = LoraWeights(torch.randn(64, 64), torch.randn(3, 64), torch.randn(64, 3), 0.5)
    p = LoraWeights(*(t.bfloat16().requires_grad_() if torch.is_tensor(t) else t for t in p))

    def op(x, seed):
        return lora_linear(lora_mlp(x, p, p, p, dropout_p=0.5, seeds=[seed] * 3), weight, bias=p.lora_B[:8, 0])

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 40):
        args = [torch.randn(rows, 64).bfloat16().requires_grad_(), torch.tensor(rows)]
        eager = run(op, args, backend="emulator")
        torch.testing.assert_close(run(compiled, args, backend="emulator")[:2], eager[:2], rtol=0, atol=0)


def test_only_the_stable_abi_is_used():
    """One build serves every torch from 2.11 on, and none with CUDA is needed to load it: of torch it names the C shim
    alone, and of CUDA nothing."""
    library = next(Path(pyfast.__file__).parent.glob("_cuda.*so"), None)
    if library is None or shutil.which("nm") is None:
        pytest.skip("_cuda was not built, or binutils are missing")
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.search(r"^_Z.*(2at|3c10|5torch)|^cu|^nv", name)]


def test_architecture():
    """use_backend's arch picks the kernels: a long row's sum is taken by a cluster of blocks on sm_90a, in another
    order than by one on sm_80. What was asked for before it comes back after it, and after an error."""
    call, losses = (torch.randn(8, 140_000).bfloat16(), torch.arange(8), None, torch.ones(8, 2).double()), {}
    with emulator.emulating("reverse", lazy=False):
        before = dict(emulator._now)
        for arch in emulator.ARCHITECTURES:
            with pyfast.use_backend("emulator", op="cross_entropy", arch=arch):
                assert emulator._now == before | {"arch": arch}
                losses[arch] = torch.ops.pyfast_emu.cross_entropy(*call, -100, 0.0, None)[0]
        with pytest.raises(ZeroDivisionError), pyfast.use_backend("emulator", arch="sm_90a"):
            raise ZeroDivisionError
        assert emulator._now == before
    assert not torch.equal(losses["sm_80"], losses["sm_90a"])
    torch.testing.assert_close(losses["sm_80"], losses["sm_90a"])


@pytest.mark.parametrize(
    "backend, arch, words",
    [
        ("emulator", "sm_70", "the emulator has no arch 'sm_70': choose from sm_80, sm_90a"),
        ("emulator", "avx2", "the emulator has no arch 'avx2': choose from sm_80, sm_90a"),
        ("torch", "sm_80", "backend 'torch' has no arch to choose: arch is for 'cpu' and 'emulator'"),
    ],
)
def test_bad_architecture(backend, arch, words):
    with pytest.raises(ValueError, match=f"^{words}$"), pyfast.use_backend(backend, arch=arch):
        pass


def test_bad_order():
    words = "no order 'sideways': choose from forward, reverse, random"
    with pytest.raises(ValueError, match=words), emulator.emulating("sideways"):
        pass


def test_doctor_names_the_architectures():
    said = dict(doctor.machine())["CUDA kernels"]
    built = list(Path(pyfast.__file__).parent.glob("_cuda.*so"))
    assert said.startswith("built for sm_80, sm_90a, compute_90" if built else "none")
