from test_rope import *  # noqa: F403
