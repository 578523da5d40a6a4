from test_activation import *  # noqa: F403
