"""The engine on the real embedded model: identity at keep ratio 1.0, and the masked reference."""

from __future__ import annotations

import pytest
import torch

from sdtp_lib import PruningConfig, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.reference import eager_copy, masked_logits, visible_per_layer

pytestmark = pytest.mark.embedded
TEXT = (
    "The harbour lay quiet under a thin fog, and the clerk who kept the tide book had not yet come down from the hill. "
    "Two boats waited. One carried salt, the other timber, and neither master would give way at the narrow lock. "
) * 6


def test_keep_ratio_one_gives_smollm2s_logits_and_ids_bit_for_bit(embedded):
    model, tokenizer = embedded
    inputs = tokenizer(TEXT, return_tensors="pt")
    config = PruningConfig.preset("keep09", model.config.num_hidden_layers, keep_ratio=1.0)
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        with token_pruning(model, config, scorers.attention()) as trace:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False), ids)
    assert trace.compression_ratio == 1.0


def test_smollm2_pruned_equals_the_masked_float64_reference_in_prefill_and_decode(embedded):
    model, tokenizer = embedded
    prompt = tokenizer(TEXT, return_tensors="pt").input_ids[:, :200]
    config = PruningConfig.preset("keep08", model.config.num_hidden_layers)
    exact = eager_copy(model)
    exact.config._attn_implementation = "sdpa"
    with torch.no_grad(), token_pruning(exact, config, scorers.attention()) as trace:
        out = exact(input_ids=prompt, use_cache=True)
        logits, tokens = [out.logits[0, -1]], []
        for _ in range(20):
            tokens.append(logits[-1].argmax())
            step = exact(input_ids=tokens[-1].view(1, 1), **cache_argument(exact, cache_in(out)))
            logits.append(step.logits[0, -1])
    exact.config._attn_implementation = "eager"
    visible = visible_per_layer(trace.kept_positions, 200, model.config.num_hidden_layers, 0)
    expected = masked_logits(exact, torch.cat([prompt[0], torch.stack(tokens)]), visible)
    last = config.layers[-1]
    # Logits reach 30 here and the norms and rotary tables compute in float32: 1e-6 relative to that scale.
    scale = expected.abs().max()
    assert (out.logits[0] - expected[trace.kept_positions[last][0]]).abs().max() <= 1e-6 * scale
    assert (torch.stack(logits) - expected[199:]).abs().max() <= 1e-6 * scale
    assert (exact(input_ids=prompt).logits[0, -1] - expected[199]).abs().max() > 1e-2
