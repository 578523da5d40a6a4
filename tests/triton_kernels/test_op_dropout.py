from test_dropout import *  # noqa: F403
