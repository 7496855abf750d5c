from __future__ import annotations

import pytest

from errata import testing

QUICK = "llama"
"""Where every promise is looked at in the fast suite; on other architectures, `SHAPED`. `make test-all` has all."""
SHAPED = (testing.the_edit_takes,)
"""What the shape of a model has most part in."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.get("architecture", QUICK) != QUICK and params.get("promise") not in SHAPED:
            item.add_marker("slow")
