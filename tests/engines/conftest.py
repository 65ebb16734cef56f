import pytest

pytest.register_assert_rewrite("nonroot.testing")
