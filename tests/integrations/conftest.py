import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The Trainer collects garbage at every start, most of its time on models this small."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
