"""Any family, batch, padding, layers, ratio, backend and dtype: every row equals the masked reference.

``SDTP_PROPERTY_CASES`` sets how many cases are drawn (default 60); ``make properties`` runs many more.
"""

from __future__ import annotations

import functools
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from sdtp_lib import PruningConfig, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.reference import FAMILIES, assert_logits_equal, eager_copy, louder, masked_logits, visible_per_layer

CASES = int(os.environ.get("SDTP_PROPERTY_CASES", "60"))
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4}


@pytest.fixture(scope="session")
def build(tiny_model):
    @functools.cache
    def pair(family, backend, dtype):
        extras = FAMILIES[family]
        model = louder(tiny_model(family, dtype=torch.float64, attn_implementation=backend, **extras))
        return model.to(dtype), eager_copy(model)

    return pair


@st.composite
def cases(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    backend = "eager" if family in ("gemma2", "bloom") else draw(st.sampled_from(["sdpa", "eager"]))
    # transformers' own eager mask makes NaN of padding in float64.
    dtype = torch.float32 if backend == "eager" else draw(st.sampled_from([torch.float64, torch.float32]))
    lengths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=3))
    layers = draw(st.sets(st.integers(1, 5), min_size=1, max_size=4))
    ratio = draw(st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 1.0]))
    config = PruningConfig(
        layers=sorted(layers),
        keep_ratio=ratio,
        sink_tokens=draw(st.integers(0, 4)),
        local_ratio=draw(st.sampled_from([0.0, 0.1, 0.5])),
        min_local_tokens=draw(st.integers(1, 8)),
    )
    return family, backend, dtype, lengths, config, draw(st.integers(0, 2**16))


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_every_row_of_every_case_equals_the_masked_reference(build, case):
    family, backend, dtype, lengths, config, seed = case
    note(f"{family} {backend} {dtype} lengths={lengths} {config} seed={seed}")
    model, twin = build(family, backend, dtype)
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, 128, (length,), generator=generator)
        mask[row, width - length :] = 1
    steps = torch.randint(3, 128, (len(lengths), 2), generator=generator)
    placed = family != "bloom"  # BLOOM's alibi reads the mask instead
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # prompts too short to prune are part of the draw
        with token_pruning(model, config, scorers.random(seed)) as trace:
            extra = {"position_ids": positions} if placed else {}
            out = model(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
            logits = [out.logits]
            for step in range(2):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                extra = {"position_ids": mask.cumsum(1)[:, -1:] - 1} if placed else {}
                out = model(
                    input_ids=steps[:, step : step + 1],
                    attention_mask=mask,
                    **cache_argument(model, cache_in(out)),
                    **extra,
                )
                logits.append(out.logits)
    for row, length in enumerate(lengths):
        visible = visible_per_layer(trace.kept_positions, length, 6, row)
        sequence = torch.cat([ids[row, width - length :], steps[row]])
        expected = masked_logits(twin, sequence, visible)
        kept = trace.kept_positions[config.layers[-1]][row]
        kept = kept[kept >= 0]
        assert len(kept) == trace.tokens_per_row[-1, row]
        found = torch.cat([logits[0][row, -len(kept) :], logits[1][row], logits[2][row]]).double()
        wanted = torch.cat([expected[kept], expected[length:]])
        assert_logits_equal(found, wanted, TOLERANCE[dtype])
