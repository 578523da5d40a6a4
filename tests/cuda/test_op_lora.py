from test_lora import *  # noqa: F403
from test_lora import OPTIONS, check, drawn, linear, lora_linear, lora_linears, lora_mlp, projection, pytest, run, torch

from pyfast import emulator


@pytest.fixture(params=emulator.ARCHITECTURES)
def arch(request):
    return request.param


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_panels_of_several_passes(kernel, dtype, dropout_p):
    """More rows of a panel than one launch takes, an adapter on both sides of the border; several strips of rows, and
    parts of several tiles of columns."""
    x = drawn(530, 610, dtype=dtype)
    projections = [projection(9, 610, dtype, rank=r, bias=r == 16) for r in (33, 20, 16)]
    check(lora_linears, [x, projections], {"dropout_p": dropout_p, "seeds": [1, 2, 3]}, *kernel)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_whole_vectors(kernel, dtype, option):
    """Matrices that TMA can copy, in more than one tile of what is multiplied and of results."""
    x = drawn(2, 75, 136, dtype=dtype)
    check(linear, [x, projection(304, 136, dtype, **OPTIONS[option])], {}, *kernel)


#: (rows, k, n, rank): several tiles in every direction for a block that stays, and more steps than stages; a rest of
#: one vector in each; whole tiles; more tiles of rows than are walked together
SHAPES = [(300, 264, 520, 33), (257, 72, 264, 8), (256, 64, 256, 16), (2080, 16, 264, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_whole_vectors(kernel, dtype, shape):
    rows, k, n, rank = shape
    check(linear, [drawn(rows, k, dtype=dtype), projection(n, k, dtype, rank=rank, bias=True)], {}, *kernel)


@pytest.mark.parametrize("count", [3, 6, 9])
def test_many_projections(kernel, dtype, count):
    """Each with a width of its own; more than one launch forms, forward, and backward."""
    x = drawn(40, 72, dtype=dtype)
    p = [projection(8 + 128 * (i % 3), 72, dtype, rank=i % 4 * 9, bias=i % 2 == 0) for i in range(count)]
    check(lora_linears, [x, p], {}, *kernel)


def test_transposed_weights_of_whole_vectors(kernel, dtype):
    """GPT-2's: columns are what is contiguous; beside another whose rows are."""
    x, p = drawn(70, 136, dtype=dtype), [projection(n, 136, dtype) for n in (264, 48)]
    p[0] = p[0]._replace(weight=p[0].weight.detach().t().contiguous().t())
    check(lora_linears, [x, p], {}, *kernel)


def test_weights_that_only_look_aligned(kernel, dtype):
    """Rows a multiple of 16 bytes apart that begin between two, and a row that all columns share."""
    x, wide = drawn(30, 72, dtype=dtype), drawn(48, 80, dtype=dtype)
    check(lambda x, w: lora_linear(x, w[:, 1:73]), [x, wide], {}, *kernel)
    check(lambda x, w: lora_linear(x, w[:1, :72].expand(48, 72)), [x, wide.detach()], {}, *kernel)


def test_adapters_do_not_meet(kernel):
    """One that overflows leaves the other projections of x as they are."""
    x, p = drawn(30, 72, dtype=torch.float16), [projection(n, 72, torch.float16) for n in (48, 64)]
    alone = run(lora_linears, [x, p[:1]], None, *kernel)[0][0]
    p[1] = p[1]._replace(lora_A=torch.full_like(p[1].lora_A, torch.inf))
    beside, other = run(lora_linears, [x, p], None, *kernel)[0]
    assert torch.equal(beside, alone) and not other.isfinite().any()


def test_mlp_of_whole_vectors(kernel, dtype):
    """Without gradients, and with those of everything."""
    x, p = drawn(130, 72, dtype=dtype), [projection(*s, dtype, bias=True) for s in ((264, 72), (264, 72), (72, 264))]
    check(lora_mlp, [x, *p], {}, *kernel)
    with torch.no_grad():
        y = run(lora_mlp, [x, *p], None, *kernel)[0]
    assert torch.equal(y[0], run(lora_mlp, [x, *p], None, *kernel)[0][0])


def test_same_bits(kernel):
    """Whatever the order of threads."""
    x, p = drawn(300, 136, dtype=torch.bfloat16), projection(304, 136, torch.bfloat16, bias=True)
    with emulator.emulating("random", seed=5, arch="sm_90a"):
        results, gradients, _ = run(linear, [x, p], None, *kernel)
    with emulator.emulating(lazy=False, arch="sm_90a"):
        again, gradients_again, _ = run(linear, [x, p], None, *kernel)
    assert all(map(torch.equal, results + gradients, again + gradients_again))
