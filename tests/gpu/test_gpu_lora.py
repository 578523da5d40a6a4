from test_op_lora import *  # noqa: F403
