"""A model, prompts and a configuration for tests of prompts in chunks."""

from __future__ import annotations

import pytest
import torch
import transformers

from sdtp_lib import PruningConfig
from sdtp_lib.pruning.generate_guard import CHUNKS_FROM
from tests.reference import FAMILIES, louder

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < CHUNKS_FROM
needs_chunks = pytest.mark.skipif(OLD, reason="this transformers' own chunks differ from the whole prompt: refused")
CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, sink_tokens=2, min_local_tokens=4)


def tokens_of(count, seed=0, rows=1):
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(seed))


def model_of(tiny_model, family="llama", **more):
    model = louder(tiny_model(family, dtype=torch.float64, **{**FAMILIES.get(family, {}), **more}))
    model.generation_config.eos_token_id = None
    return model
