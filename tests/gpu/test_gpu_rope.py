from test_op_rope import *  # noqa: F403
