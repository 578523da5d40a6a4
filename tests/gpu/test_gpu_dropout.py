from test_op_dropout import *  # noqa: F403
