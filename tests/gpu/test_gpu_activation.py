from test_op_activation import *  # noqa: F403
