"""``prune="every"``: what is added to a cache is cut too, after a cached prefix and in each turn."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from sdtp_lib import PruningConfig, TokenPruners, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.pruning.chunked import tokens_of
from tests.reference import assert_logits_equal, eager_copy, louder, masked_logits

CONFIG = PruningConfig(
    layers=(1, 3, 4), keep_ratio=0.6, sink_tokens=2, min_local_tokens=4, prune="every", min_prompt_tokens=8
)
FAMILIES = {
    "llama": {}, "qwen3": {}, "mistral": {"sliding_window": 40}, "gemma3_text": {"sliding_window": 24}, "bloom": {},
    "gpt_neox": {},
}  # fmt: skip


def _forward(model, ids, cache, **arguments):
    out = model(input_ids=ids, **cache_argument(model, cache), use_cache=True, **arguments)
    return out.logits[0], cache_in(out)


def _hide(visible, start, trace, length):
    """Take what a turn of ``length`` tokens from column ``start`` on dropped out of ``visible`` (L, C)."""
    for stage, kept in sorted(trace.kept_positions.items()):
        visible[stage:, start : start + length] = False
        visible[stage:, start + kept[0]] = True


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [0, 12])
def test_a_cached_prefix_and_three_turns_equal_the_masked_reference(tiny_model, family, backend, prefix):
    if family == "bloom" and backend == "sdpa":
        pytest.skip("BLOOM has eager attention only")
    model = louder(tiny_model(family, dtype=torch.float64, attn_implementation=backend, **FAMILIES[family]))
    pieces = [tokens_of(n, seed) for seed, n in enumerate((50, 1, 1, 30, 1, 20, 5))]
    head = tokens_of(prefix, 99)
    cache, start, found, turns = DynamicCache(config=model.config), prefix, [], 0
    with torch.no_grad():
        if prefix:  # outside the `with`, so never touched
            model(input_ids=head, **cache_argument(model, cache))
        sequence = torch.cat([head, *pieces], dim=1)[0]
        visible = torch.ones(6, len(sequence), dtype=torch.bool)
        with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
            for piece in pieces:
                length, before = piece.shape[1], trace.prefills
                logits, cache = _forward(model, piece, cache)
                columns = torch.arange(start, start + length)
                if trace.prefills > before:
                    turns += 1
                    assert logits.shape[0] < length, "nothing was cut in this turn"
                    columns = start + trace.kept_positions[4][0]
                    _hide(visible, start, trace, length)
                found.append((columns, logits))
                start += length
    assert turns == 3, "the turns of 50, 30 and 20 tokens are cut; single tokens and 5 are not"
    expected = masked_logits(eager_copy(model), sequence, visible)
    for columns, logits in found:
        assert_logits_equal(logits, expected[columns])
    whole = masked_logits(eager_copy(model), sequence, torch.ones_like(visible))
    assert (whole[-5:] - expected[-5:]).abs().max() > 1e-3, "the reference would not notice missing tokens"


def test_attention_is_shared_out_over_the_prefix_and_scores_are_of_new_tokens_only(tiny_model):
    """What the last tokens pay to the prefix is missing from the new tokens' sum, as in one whole forward."""
    model = louder(tiny_model(dtype=torch.float64, attn_implementation="eager"))
    head, new = tokens_of(12, 1), tokens_of(40, 2)
    cache = DynamicCache(config=model.config)
    whole = model(input_ids=torch.cat([head, new], dim=1), output_attentions=True).attentions[1]
    expected = whole[0, :, -4:, 12:].mean(dim=(0, 1))
    with torch.no_grad():
        model(input_ids=head, **cache_argument(model, cache))
        with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
            _forward(model, new, cache)
    assert trace.scores[1].shape == (1, 40)
    torch.testing.assert_close(trace.scores[1][0], expected, check_dtype=False)
    assert expected.sum() < 0.99


def test_rows_with_padding_in_the_prefix_and_in_the_turn_give_what_they_give_alone(tiny_model):
    model = louder(tiny_model(dtype=torch.float64))
    rows = [(tokens_of(40, 1)[0], tokens_of(30, 2)[0]), (tokens_of(25, 3)[0], tokens_of(18, 4)[0])]

    def turn(parts, width):
        ids, mask = torch.zeros(len(parts), width, dtype=torch.long), torch.zeros(len(parts), width, dtype=torch.long)
        for row, part in enumerate(parts):
            ids[row, width - len(part) :], mask[row, width - len(part) :] = part, 1
        return ids, mask

    def run(pairs):
        first, mask = turn([pair[0] for pair in pairs], max(len(pair[0]) for pair in pairs))
        second, more = turn([pair[1] for pair in pairs], max(len(pair[1]) for pair in pairs))
        both = torch.cat([mask, more], dim=1)
        places = (both.cumsum(1) - 1).clamp_min(0)
        step = torch.full((len(pairs), 1), 7)
        last = torch.cat([both, torch.ones_like(step)], dim=1)
        with torch.no_grad(), token_pruning(model, CONFIG, scorers.attention(4)) as trace:
            _, cache = _batch(first, mask, places[:, : mask.shape[1]], None)
            _, cache = _batch(second, both, places[:, mask.shape[1] :], cache)
            logits, _ = _batch(step, last, last.cumsum(1)[:, -1:] - 1, cache)
        return logits[:, -1], trace

    def _batch(ids, mask, places, cache):
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, **cache_argument(model, cache)
        )
        return out.logits, cache_in(out)

    together, trace = run(rows)
    for row, pair in enumerate(rows):
        alone, own = run([pair])
        assert_logits_equal(together[row], alone[0])
        kept = trace.kept_positions[4][row]
        assert torch.equal(kept[kept >= 0], own.kept_positions[4][0])


def test_generate_prunes_what_follows_a_system_prompt_and_each_turn(tiny_model):
    model = louder(tiny_model())
    model.generation_config.eos_token_id = None
    system, first, second = tokens_of(12, 1), tokens_of(40, 2), tokens_of(30, 3)
    cache = DynamicCache(config=model.config)
    model(input_ids=system, **cache_argument(model, cache))
    with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        ids = torch.cat([system, first], dim=1)
        out = model.generate(
            ids, **cache_argument(model, cache), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        assert trace.prompt_lengths == [40]
        branch = copy.deepcopy(cache_in(out))
        longer = torch.cat([out.sequences, second], dim=1)
        answer = model.generate(longer, **cache_argument(model, branch), max_new_tokens=4, do_sample=False)
    assert trace.prefills == 2
    assert trace.prompt_lengths == [31], "the turn's 30 tokens and the last answer token, which had not been run"
    assert answer.shape[1] == longer.shape[1] + 4


def test_learned_pruners_score_a_turn_as_they_score_a_prompt(tiny_model):
    model = louder(tiny_model())
    torch.manual_seed(0)
    pruners = TokenPruners.for_model(model, (1, 3, 4), features=("hidden", "distance", "query", "attention", "memory"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens_of(12, 1), **cache_argument(model, cache))
        with token_pruning(model, CONFIG, pruners) as trace:
            _forward(model, tokens_of(40, 2), cache)
    assert trace.tokens_per_layer == [40, 24, 24, 14, 8, 8]
    assert int(trace.kept_positions[4].max()) == 39


def test_first_leaves_later_turns_whole(tiny_model):
    model = louder(tiny_model())
    with torch.no_grad(), token_pruning(model, CONFIG.replace(prune="first"), scorers.recency()) as trace:
        _, cache = _forward(model, tokens_of(40, 1), None)
        logits, _ = _forward(model, tokens_of(30, 2), cache)
    assert logits.shape[0] == 30
    assert trace.prefills == 1
