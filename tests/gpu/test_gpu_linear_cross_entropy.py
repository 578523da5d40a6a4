from test_op_linear_cross_entropy import *  # noqa: F403
