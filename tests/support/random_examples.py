"""How many random examples a property is tried on.

``make test`` takes enough of them to notice what changes break; ``make test-long`` takes
``CHUNKFLOW_TEST_EXAMPLES`` times as many.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_TIMES = int(os.environ.get("CHUNKFLOW_TEST_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """Settings of a property that takes ``count`` examples in ``make test``, without a deadline."""
    unhealthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count * _TIMES, deadline=None, suppress_health_check=unhealthy)
