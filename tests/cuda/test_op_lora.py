from test_lora import *  # noqa: F403
