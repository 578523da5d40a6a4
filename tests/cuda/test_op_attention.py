from test_attention import *  # noqa: F403
