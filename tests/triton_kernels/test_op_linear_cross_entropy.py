from bad_targets import test_linear_cross_entropy_target_out_of_range  # noqa: F401
from test_linear_cross_entropy import *  # noqa: F403
