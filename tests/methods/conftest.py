from __future__ import annotations

import pytest

QUICK = ("gpt2", "llama")
"""Architectures on which every promise is looked at in the fast suite; on the others, those that the shape of a model
has a part in. `make test-all` looks at all."""
SHAPED = ("test_1", "test_3_the", "test_4", "test_6_the")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        architecture = getattr(item, "callspec", None) and item.callspec.params.get("architecture")
        if architecture and architecture not in QUICK and not item.name.startswith(SHAPED):
            item.add_marker("slow")
