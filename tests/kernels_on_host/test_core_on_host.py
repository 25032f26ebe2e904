"""The kernels pass the tests of the core's operations: their `core` is the host build here."""

import pytest
from test_core import (  # noqa: F401 - collected here as well
    test_aim_sums_up_the_tiles_of_long_rows,
    test_aim_takes_signs_and_the_slope_of_what_can_move,
    test_compact_keeps_active_rows_in_order,
    test_half_precision_is_read_and_rounded_as_torch_does,
    test_inspect_flags_each_row,
    test_inspect_flags_each_tile_of_a_long_row,
    test_logits_that_are_not_finite_fail_their_row_only,
    test_perturb_gathers_moves_and_clips,
    test_seed_is_the_gradient_of_the_log_odds,
    test_seed_keeps_its_precision_where_the_model_is_confident,
    test_the_least_step_is_that_of_the_row,
    test_ties_go_to_the_smallest_class,
)

pytestmark = pytest.mark.core
