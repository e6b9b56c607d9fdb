"""Rows of different length under sdpa: attended row by row, packed, and each as if it were alone."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdtp_lib import PruningConfig, scorers, token_pruning
from sdtp_lib.architectures import row_attention, row_masks
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.config import PruningNotSupported
from tests.reference import assert_logits_equal, eager_copy, louder, masked_logits, visible_per_layer

CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
LENGTHS = (70, 9, 41)
WINDOWS = {"mistral": {"sliding_window": 24}, "gemma3_text": {"sliding_window": 24, "query_pre_attn_scalar": 8},
           "mixtral": {"sliding_window": 24}, "qwen2": {"use_sliding_window": True, "sliding_window": 24,
                                                        "max_window_layers": 2}}  # fmt: skip
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
SIZES = {"qwen3_moe": MOE, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}}
CASES = [*((family, "whole") for family in sorted(row_attention.FAMILIES)), *((family, "window") for family in WINDOWS)]


def _build(tiny_model, family="llama", kind="whole", **more):
    extras = WINDOWS[family] if kind == "window" else {"sliding_window": None} if family in WINDOWS else {}
    if kind == "whole" and family == "gemma3_text":
        extras = {"sliding_window": 512, "query_pre_attn_scalar": 8}
    extras = {**SIZES.get(family, {}), **extras, **more}
    model = louder(tiny_model(family, dtype=torch.float64, attn_implementation="sdpa", **extras))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fast ones know no float64
    return model


def _rows(lengths=LENGTHS, spare=0):
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 128, (length,), generator=generator) for length in lengths]
    width = max(lengths) + spare
    batch, mask = (torch.zeros(len(lengths), width, dtype=torch.long) for _ in range(2))
    for index, row in enumerate(rows):
        batch[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return rows, batch, mask


def _prefill(model, batch, mask, cache=None, **more):
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -batch.shape[1] :]
    cached = {} if cache is None else cache_argument(model, cache)
    out = model(input_ids=batch, attention_mask=mask, position_ids=positions, use_cache=True, **cached, **more)
    return out.logits, cache_in(out)


@pytest.fixture
def attended(monkeypatch):
    """(queries, keys, whether there was a mask) of each call of sdpa."""
    calls, inner = [], torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, attn_mask=None, **options):
        calls.append((*query.shape[:1], query.shape[2], key.shape[2], attn_mask is not None))
        return inner(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    return calls


@pytest.mark.parametrize("ratio", [0.6, 1.0])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_each_row_is_as_if_alone_and_no_mask_of_all_tokens_exists(
    tiny_model, monkeypatch, attended, family, kind, ratio
):
    monkeypatch.setattr(row_masks, "BLOCK", 16)
    model, config = _build(tiny_model, family, kind), CONFIG.replace(keep_ratio=ratio)
    rows, batch, mask = _rows()
    step, longer = torch.full((3, 1), 7), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    with torch.no_grad(), token_pruning(model, config, scorers.attention(4)) as trace:
        attended.clear()  # what entering asked of a family that is not on the list
        logits, cache = _prefill(model, batch, mask)
        prefill = list(attended)
        after = _prefill(model, step, longer, cache)[0]
    assert {rows for rows, *_ in prefill} == {1}, "rows are attended one by one"
    assert all(queries <= 16 for _, queries, _, masked in prefill if masked), "masks are of 16 queries at most"
    assert any(masked for *_, masked in prefill) == (kind == "window")
    for index, row in enumerate(rows):
        with torch.no_grad(), token_pruning(model, config, scorers.attention(4)) as alone:
            expected, own = _prefill(model, row[None], torch.ones(1, len(row), dtype=torch.long))
            ones = torch.ones(1, len(row) + 1, dtype=torch.long)
            expected_after = _prefill(model, step[:1], ones, own)[0]
        assert_logits_equal(logits[index, logits.shape[1] - expected.shape[1] :], expected[0])
        assert_logits_equal(after[index], expected_after[0])
        for layer in config.layers:
            kept = trace.kept_positions[layer][index]
            assert torch.equal(kept[kept >= 0], alone.kept_positions[layer][0])
            assert torch.equal(trace.scores[layer][index][-alone.scores[layer].shape[1] :].isinf(),
                               alone.scores[layer][0].isinf())  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_packed_row_equals_the_masked_reference(tiny_model, family):
    model = _build(tiny_model, family, "window" if family == "mistral" else "whole")
    rows, batch, mask = _rows()
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        logits, _ = _prefill(model, batch, mask)
    for index, row in enumerate(rows):
        own = {layer: kept[index : index + 1] for layer, kept in trace.kept_positions.items()}
        expected = masked_logits(eager_copy(model), row, visible_per_layer(own, len(row), 6, 0))
        kept = own[4][0][own[4][0] >= 0]
        assert_logits_equal(logits[index, -len(kept) :], expected[kept])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_turns_on_a_padded_prefix_are_packed_and_equal_the_usual_way(tiny_model, monkeypatch, attended, family):
    """prune='every': padding in the prefix, in the turn, and a decode step after; with windows, too."""
    monkeypatch.setattr(row_masks, "BLOCK", 16)
    model = _build(tiny_model, family, "window" if family == "mistral" else "whole")
    _, first, mask = _rows()
    _, second, more = _rows((20, 33, 7))
    both = torch.cat([mask, more], dim=1)
    step, last = torch.full((3, 1), 7), torch.cat([both, torch.ones(3, 1, dtype=torch.long)], dim=1)

    def run():
        found = []
        with torch.no_grad(), token_pruning(model, CONFIG.replace(prune="every"), scorers.attention(4)) as trace:
            cache = None
            for ids, seen in ((first, mask), (second, both), (step, last)):
                attended.clear()
                logits, cache = _prefill(model, ids, seen, cache)
                found.append((logits[:, -1], {rows for rows, *_ in attended}))
        return found, trace.kept_positions

    packed, kept = run()
    monkeypatch.setattr(row_attention, "FAMILIES", frozenset())
    usual, expected = run()
    assert [rows for _, rows in packed] == [{1}, {1}, {3}]
    assert [rows for _, rows in usual] == [{3}, {3}, {3}]
    for (found, _), (wanted, _) in zip(packed, usual, strict=True):
        assert_logits_equal(found, wanted)
    assert all(torch.equal(kept[layer], expected[layer]) for layer in CONFIG.layers)


def test_a_batch_that_is_padded_more_than_its_longest_row_needs(tiny_model, attended):
    model = _build(tiny_model)
    rows, batch, mask = _rows(spare=5)
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        logits, cache = _prefill(model, batch, mask)
        assert {rows for rows, *_ in attended} == {1}
        alone, _ = _prefill(model, rows[0][None], torch.ones(1, 70, dtype=torch.long))
    assert_logits_equal(logits[0], alone[0])
    assert cache.layers[0].keys.shape[2] == 75, "the cache has the batch's columns, as without pruning"


def test_a_prefill_without_a_cache(tiny_model):
    model = _build(tiny_model)
    rows, batch, mask = _rows()
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        logits = model(input_ids=batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                       use_cache=False).logits  # fmt: skip
        alone = model(input_ids=rows[2][None], use_cache=False).logits
    assert_logits_equal(logits[2, -alone.shape[1] :], alone[0])


def test_whoever_looks_at_layers_sees_rows(tiny_model, attended):
    """Hidden states that are asked for, and somebody else's hooks: such forwards are not packed."""
    model = _build(tiny_model)
    _, batch, mask = _rows()
    seen = []
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()) as trace:
        out = model(input_ids=batch, attention_mask=mask, use_cache=True, output_hidden_states=True)
        assert [state.shape[:2] for state in out.hidden_states[:2]] == [(3, 70), (3, 70)]
        handle = model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, output: seen.append(output.shape))
        plain, _ = _prefill(model, batch, mask)
        handle.remove()
        assert {rows for rows, *_ in attended} == {3}
        attended.clear()
        packed, _ = _prefill(model, batch, mask)
    assert {rows for rows, *_ in attended} == {1}, "once they are gone it is packed again"
    assert seen == [(3, trace.tokens_per_layer[2], 32)]
    assert_logits_equal(packed[:, -1], plain[:, -1])


def test_a_mask_that_rows_cannot_say_is_made_as_ever(tiny_model, attended, monkeypatch):
    """Chunked attention looks local like a window, and bidirectional attention is not causal."""
    from transformers import masking_utils

    padding = torch.ones(2, 8, dtype=torch.bool)
    chunks = {"mask_function": masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=int)),
              "local_size": 3, "attention_mask": padding}  # fmt: skip
    assert row_attention._window_of(chunks) is None
    window = {"mask_function": masking_utils.sliding_window_causal_mask_function(3), "local_size": 3}
    assert row_attention._window_of({**window, "attention_mask": padding}) == 3
    assert row_attention._window_of({"attention_mask": padding}) == 0
    assert row_attention._window_of({"attention_mask": padding, "allow_is_causal_skip": False}) is None
    assert row_attention._window_of({"attention_mask": padding, "use_vmap": True}) is None
    assert row_attention._window_of({"attention_mask": None}) is None

    model = _build(tiny_model, "gemma3_text", "window")
    _, batch, mask = _rows()
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        packed, _ = _prefill(model, batch, mask)
        calls = iter((24, None))  # full attention is made first: the window cannot be said, after one that could
        monkeypatch.setattr(row_attention, "_window_of", lambda _arguments: 0 if next(calls) == 24 else None)
        attended.clear()
        usual, _ = _prefill(model, batch, mask)
    assert {rows for rows, *_ in attended} == {3}
    assert_logits_equal(usual[:, -1], packed[:, -1])


def test_the_registries_and_the_configuration_are_as_before_also_after_an_error(tiny_model):
    model = _build(tiny_model)
    rows, batch, mask = _rows()
    before = [set(each._global_mapping) for each in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]

    def fails(stage):
        raise KeyboardInterrupt  # not an Exception: hooks that always run do not run after it

    with pytest.raises(KeyboardInterrupt), token_pruning(model, CONFIG, fails):
        _prefill(model, batch, mask)
    with token_pruning(model, CONFIG, scorers.recency()):
        _prefill(model, batch, mask)
        assert type(model.config._attn_implementation) is str, "only while a forward runs"
        with pytest.raises(PruningNotSupported, match="padding that is not on the left"):
            _prefill(model, batch, mask.flip(1))
    assert type(model.config._attn_implementation) is str
    assert [set(each._global_mapping) for each in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)] == before
    assert not any(layer._forward_hooks for layer in model.model.layers)
