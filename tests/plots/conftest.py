"""Axes to draw on, without a window."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def _no_window():
    matplotlib.use("agg")
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]
