"""The engine against the slow masked reference: what is dropped must be as if masked out from its stage on."""

from __future__ import annotations

import pytest
import torch

from sdtp_lib import PruningConfig, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.reference import FAMILIES, assert_logits_equal, eager_copy, louder, masked_logits, visible_per_layer

CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
EAGER_ONLY = ("gemma2", "bloom")
CASES = [
    pytest.param(family, backend, id=f"{family}-{backend}")
    for family in FAMILIES
    for backend in ("sdpa", "eager")
    if backend == "eager" or family not in EAGER_ONLY
]


def _build(tiny_model, family, backend, **overrides):
    extras = {**FAMILIES[family], **overrides}
    return louder(tiny_model(family, dtype=torch.float64, attn_implementation=backend, **extras))


def _greedy(model, logits, cache, steps, mask=None):
    """The next ``steps`` tokens (B, steps) and the logits (B, steps + 1, V) that chose them and come after them."""
    collected, tokens = [logits[:, -1]], []
    for _ in range(steps):
        token = collected[-1].argmax(dim=-1, keepdim=True)
        tokens.append(token)
        extra = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            positions = mask.cumsum(dim=1)[:, -1:] - 1
            extra = {"attention_mask": mask}
            if model.config.model_type != "bloom":
                extra["position_ids"] = positions
        out = model(input_ids=token, **cache_argument(model, cache), use_cache=True, **extra)
        collected.append(out.logits[:, -1])
    return torch.cat(tokens, dim=1), torch.stack(collected, dim=1)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_prefill_and_twenty_decode_steps_equal_the_masked_reference(tiny_model, family, backend):
    model = _build(tiny_model, family, backend)
    torch.manual_seed(1)
    prompt = torch.randint(3, 128, (1, 70))
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        out = model(input_ids=prompt, use_cache=True)
        tokens, logits = _greedy(model, out.logits, cache_in(out), 20)
    assert trace.tokens_per_layer == [70, 42, 42, 25, 15, 15]

    twin = eager_copy(model)
    visible = visible_per_layer(trace.kept_positions, 70, 6, 0)
    sequence = torch.cat([prompt[0], tokens[0]])
    expected = masked_logits(twin, sequence, visible)
    assert_logits_equal(out.logits[0], expected[trace.kept_positions[4][0]])
    assert_logits_equal(logits[0], expected[69:])
    unpruned = masked_logits(twin, sequence, torch.ones_like(visible))
    assert (unpruned[69:] - expected[69:]).abs().max() > 1e-3, "the reference would not notice missing tokens"


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_each_row_of_a_padded_batch_gives_what_it_gives_alone(tiny_model, family, backend):
    model, tolerance = _build(tiny_model, family, backend), 1e-6
    if backend == "eager":
        # transformers' own eager mask makes NaN of padding in float64: its softmax casts float64's minimum to float32.
        model, tolerance = model.float(), 1e-4
    torch.manual_seed(2)
    lengths = (70, 9, 41)
    rows = [torch.randint(3, 128, (length,)) for length in lengths]
    batch = torch.zeros(3, 70, dtype=torch.long)
    mask = torch.zeros(3, 70, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, 70 - len(row) :] = row
        mask[index, 70 - len(row) :] = 1
    scorer = scorers.attention(4)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    extra = {} if family == "bloom" else {"position_ids": positions}
    with torch.no_grad(), token_pruning(model, CONFIG, scorer) as trace:
        out = model(input_ids=batch, attention_mask=mask, use_cache=True, **extra)
        tokens, logits = _greedy(model, out.logits, cache_in(out), 8, mask)
    together = (dict(trace.kept_positions), trace.tokens_per_row)
    for index, row in enumerate(rows):
        with torch.no_grad(), token_pruning(model, CONFIG, scorer) as alone:
            out = model(input_ids=row[None], use_cache=True)
            alone_tokens, alone_logits = _greedy(model, out.logits, cache_in(out), 8)
        for layer in CONFIG.layers:
            kept = together[0][layer][index]
            assert kept[kept >= 0].tolist() == alone.kept_positions[layer][0].tolist()
            assert (kept[: -len(alone.kept_positions[layer][0])] == -1).all()
        assert together[1][:, index].tolist() == alone.tokens_per_layer
        assert tokens[index].tolist() == alone_tokens[0].tolist()
        assert_logits_equal(logits[index], alone_logits[0], tolerance)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_keep_ratio_one_gives_the_plain_models_logits_and_ids_bit_for_bit(tiny_model, family, backend):
    model = _build(tiny_model, family, backend).float()
    torch.manual_seed(3)
    prompt = torch.randint(3, 128, (2, 50))
    plain = model(input_ids=prompt).logits
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    with token_pruning(model, CONFIG.replace(keep_ratio=1.0), scorers.random()) as trace:
        assert torch.equal(model(input_ids=prompt).logits, plain)
        mask = torch.ones_like(prompt)
        assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=mask), ids)
    assert trace.compression_ratio == 1.0
    assert sorted(trace.kept_positions) == [1, 3, 4]


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("pieces", [(9,), (4, 1, 4)], ids=["at-once", "in-pieces"])
def test_a_second_turn_on_the_pruned_cache_equals_the_reference(tiny_model, family, backend, pieces):
    model = _build(tiny_model, family, backend)
    torch.manual_seed(4)
    prompt, turn = torch.randint(3, 128, (1, 60)), torch.randint(3, 128, (1, 9))
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        cache = cache_in(model(input_ids=prompt, use_cache=True))
        before = dict(trace.kept_positions)
        logits = torch.cat(
            [model(input_ids=piece, **cache_argument(model, cache)).logits[0] for piece in turn.split(pieces, dim=1)]
        )
    assert trace.prefills == 1
    assert all(torch.equal(trace.kept_positions[layer], kept) for layer, kept in before.items())
    visible = visible_per_layer(trace.kept_positions, 60, 6, 0)
    expected = masked_logits(eager_copy(model), torch.cat([prompt, turn], dim=1)[0], visible)
    assert_logits_equal(logits, expected[60:])
