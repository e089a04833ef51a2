import os
import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores
    # torch's own modules, not ours: they warn while they are imported.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
