from test_op_cross_entropy import *  # noqa: F403
