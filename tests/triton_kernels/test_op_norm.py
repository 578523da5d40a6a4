from test_norm import *  # noqa: F403
