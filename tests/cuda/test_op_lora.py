from test_lora import *  # noqa: F403
from test_lora import check, drawn, lora_linears, projection, pytest


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_panels_of_several_passes(kernel, dtype, dropout_p):
    """More rows of a panel than one launch takes, an adapter on both sides of the border; several strips of rows, and
    parts of several tiles of columns."""
    x = drawn(530, 610, dtype=dtype)
    projections = [projection(9, 610, dtype, rank=r, bias=r == 16) for r in (33, 20, 16)]
    check(lora_linears, [x, projections], {"dropout_p": dropout_p, "seeds": [1, 2, 3]}, *kernel)
