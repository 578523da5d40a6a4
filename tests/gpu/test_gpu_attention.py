from test_op_attention import *  # noqa: F403
