from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from nonroot.testing.differential_machine import Machine

settings.register_profile(
    "model",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("model")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Every exception ends its runs."""
    one = Machine()
    yield one
    one.close()
