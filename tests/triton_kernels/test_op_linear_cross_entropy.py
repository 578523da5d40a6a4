from test_linear_cross_entropy import *  # noqa: F403
