from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Lightning's remarks on small data and on what torch calls deprecated; everything else stays an error.
REMARKS = (
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*LeafSpec.*is deprecated",
    "ignore:The number of training batches:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:`torch.jit.*is deprecated:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            for remark in REMARKS:
                item.add_marker(pytest.mark.filterwarnings(remark))
