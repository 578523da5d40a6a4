import pytest
import torch

import pyfast
from pyfast.ops import rope


def angles(*shape, dtype=torch.float32, interleaved=False):
    """cos and sin as transformers makes them: each angle twice, in halves or side by side."""
    angle = torch.rand(*shape[:-1], shape[-1] // 2, dtype=torch.float64) * 7
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 6])
def test_reference_gradient(backend, interleaved, width):
    q, k = (torch.randn(2, h, 3, 6, dtype=torch.float64, requires_grad=True) for h in (4, 2))
    cos, sin = angles(2, 3, width, dtype=torch.float64, interleaved=interleaved)
    with pyfast.use_backend(backend):
        assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), (q, k))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_same_as_transformers(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8)
    with pyfast.use_backend(backend):
        for module, interleaved in ((llama, False), (cohere, True)):
            cos, sin = angles(2, 5, 8, interleaved=interleaved)
            expected = module.apply_rotary_pos_emb(q, k, cos, sin)
            for y, e in zip(rope(q, k, cos, sin, interleaved=interleaved), expected, strict=True):
                torch.testing.assert_close(y, e)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.randn(2, 3, 8)}, ValueError, r"q has shape \(2, 3, 8\)"),
        ({"k": torch.randn(2, 3, 8)}, ValueError, "k has shape"),
        ({"k": torch.randn(1, 2, 3, 8)}, ValueError, "k has shape"),
        ({"k": torch.randn(2, 2, 3, 6)}, ValueError, "k has shape"),
        ({"k": torch.randn(2, 2, 3, 8).half()}, TypeError, "k is float16"),
        ({"q": "q"}, TypeError, "q is str"),
        ({"cos": torch.randn(4, 8), "sin": torch.randn(4, 8)}, ValueError, "cos has shape"),
        ({"cos": torch.randn(3, 3, 8), "sin": torch.randn(3, 3, 8)}, ValueError, "cos has shape"),
        ({"cos": torch.randn(3, 7), "sin": torch.randn(3, 7)}, ValueError, "7 wide"),
        ({"cos": torch.randn(3, 10), "sin": torch.randn(3, 10)}, ValueError, "10 wide"),
        ({"cos": torch.randn(3, 0), "sin": torch.randn(3, 0)}, ValueError, "0 wide"),
        ({"sin": torch.randn(3, 4)}, ValueError, "sin is"),
        ({"cos": torch.randn(3, 8).half(), "sin": torch.randn(3, 8).half()}, TypeError, "cos is float16"),
        ({"cos": torch.randn(3, 8, requires_grad=True)}, ValueError, "no gradient"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {
        "q": torch.randn(2, 4, 3, 8),
        "k": torch.randn(2, 2, 3, 8),
        "cos": torch.randn(3, 8),
        "sin": torch.randn(3, 8),
    }
    with pytest.raises(error, match=words):
        rope(**(arguments | change))
