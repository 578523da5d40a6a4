"""The CUDA kernels behind the public ops: chosen only where they should be, and understood by torch.compile."""

from pathlib import Path

import pytest
import torch
from harness import run

import pyfast
from pyfast import dispatch, doctor, emulator
from pyfast.ops import cross_entropy, swiglu

x, target = torch.randn(5, 40)[:, :33], torch.tensor([3, 32, 2, 0, -100])

#: schema -> arguments of a few calls
CALLS = {
    "cross_entropy": [
        (x, target, None, None, -100, 0.0, None),
        (x, target, torch.rand(33), torch.rand(5, 2, dtype=torch.float64), -100, 0.1, 2.0),
    ],
}


@pytest.fixture(autouse=True)
def emulated():
    reason = emulator.load()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, fake, and no input changed or aliased."""
    for call in CALLS[name]:
        torch.library.opcheck(getattr(torch.ops.pyfast_cuda, name).default, call)


def test_never_chosen_by_itself():
    """Not on a CPU, and on a GPU only after what was measured there."""
    for op, row in dispatch.TABLE.items():
        assert "cuda" not in row["cpu"]
        assert "cuda" not in row.get("cuda", ())[:-1]
        assert dispatch.choose(op, torch.randn(3)) != "cuda"


def test_refuses_what_it_does_not_serve():
    with pyfast.use_backend("cuda"):
        with pytest.raises(ValueError, match="'cuda' was asked for, but it has no kernel for this op"):
            swiglu(torch.randn(3), torch.randn(3))
        with pytest.raises(ValueError, match="kernels serve float32, bfloat16 and float16"):
            cross_entropy(torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))


def test_a_kernel_checks_its_arguments():
    """A direct call never reads out of bounds."""
    call = torch.ops.pyfast_cuda.cross_entropy
    for bad in (target[:4], target.int(), torch.stack([target] * 2, -1)[:, 0]):
        with pytest.raises(RuntimeError, match="target"):
            call(x, bad, None, None, -100, 0.0, None)
    with pytest.raises(RuntimeError, match=r"weight has shape \(32\), expected \(classes\)"):
        call(x, target, torch.rand(32), None, -100, 0.0, None)
    with pytest.raises(RuntimeError, match="upstream has another dtype"):
        call(x, target, None, torch.rand(5, 2), -100, 0.0, None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    """fullgraph=True traces through the kernels' fakes."""
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, classes in ((4, 20), (7, 31)):
        args = [torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))]
        eager = run(cross_entropy, args, backend="cuda")
        torch.testing.assert_close(run(compiled, args, backend="cuda")[:2], eager[:2], rtol=1e-6, atol=1e-7)


def test_bad_emulation():
    with pytest.raises(RuntimeError, match="order is sideways"), emulator.emulating("sideways"):
        pass
    with pytest.raises(RuntimeError, match="arch is sm_70"), emulator.emulating(arch="sm_70"):
        pass


def test_doctor_names_the_architectures():
    said = dict(doctor.machine())["CUDA kernels"]
    built = list(Path(pyfast.__file__).parent.glob("_cuda.*so"))
    assert said.startswith("built for sm_80, sm_90a, compute_90" if built else "none")
