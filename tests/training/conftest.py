"""Labelled samples that several test modules train on."""

from __future__ import annotations

import pytest

from sdtp_lib.training.saliency import compute_saliency
from tests.training.made_up import LAYERS, samples


@pytest.fixture(scope="module")
def labelled(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return compute_saliency(tiny_model(), samples(), LAYERS, cache_dir=folder, progress=False, store_hidden=True)
