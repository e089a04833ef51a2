import os
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from decomp.network.flops import observe


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


SECONDS_PER_MAC = 1e-9


class MacTimer:
    """In place of torch's Timer: every multiply-add takes a nanosecond, whatever else the machine does."""

    def __init__(self, statement, globals, num_threads):
        self._statement, self._globals = statement, globals

    def blocked_autorange(self, min_run_time):
        with FlopCounterMode(display=False) as counter:
            exec(self._statement, dict(self._globals))
        self.median = counter.get_total_flops() / 2 * SECONDS_PER_MAC
        return self


@pytest.fixture
def seconds_of_macs(monkeypatch):
    """Measured seconds are MACs times the value of this fixture."""
    monkeypatch.setattr("decomp.planning.latency.Timer", MacTimer)
    monkeypatch.setattr(
        "decomp.planning.planner.layer_seconds",
        lambda model, batch, layers: {
            name: macs * SECONDS_PER_MAC for name, macs in observe(model, batch, layers).macs.items()
        },
    )
    return SECONDS_PER_MAC


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores
    # torch's own modules, not ours: they warn while they are imported.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
