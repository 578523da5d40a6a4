from test_op_norm import *  # noqa: F403
