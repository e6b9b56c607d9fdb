"""A prompt in chunks (``prefill_chunk_size``), each cut before the next, is the one model that saw the kept tokens."""

from __future__ import annotations

import copy
import random
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from sdtp_lib import PruningConfig, TokenPruners, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in, cache_lengths
from sdtp_lib.budget import tokens_per_layer
from sdtp_lib.pruning.plan import chunk_counts, chunk_size, shared_out
from tests.pruning.chunked import CONFIG, model_of, needs_chunks, tokens_of
from tests.reference import FAMILIES, assert_logits_equal, eager_copy, masked_logits, visible_per_layer

pytestmark = needs_chunks

TOLD = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def _assert_equals_reference(model, out, trace, prompt, row=0, padding=0):
    """Each decoded token's logits, from the model at full length with the dropped tokens masked."""
    logits = torch.stack(out.logits, dim=1)[row]
    sequence = out.sequences[row, padding:]
    visible = visible_per_layer(trace.kept_positions, prompt, 6, row)
    expected = masked_logits(eager_copy(model), sequence, visible)
    found = logits.to(torch.float64)
    tolerance = 1e-6 if model.dtype == torch.float64 else 3e-5
    assert_logits_equal(found, expected[prompt - 1 : prompt - 1 + len(found)], tolerance)
    whole = masked_logits(eager_copy(model), sequence, torch.ones_like(visible))
    assert (whole - expected)[prompt - 1 :].abs().max() > 1e-3, "the reference would not notice missing tokens"


@pytest.mark.parametrize("size", [17, 40])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_equal_the_masked_reference_for_what_they_kept(tiny_model, family, backend, size):
    """Rotary, learned and alibi positions, windows shorter and longer than a chunk, grouped heads."""
    if family in ("bloom", "gemma2") and backend == "sdpa":
        pytest.skip("eager attention only")
    model = model_of(tiny_model, family, attn_implementation=backend)
    prompt = tokens_of(101)
    with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        out = model.generate(prompt, max_new_tokens=4, prefill_chunk_size=size, **TOLD)
    counts = tokens_per_layer(CONFIG, 6, 101)
    assert trace.tokens_per_layer == counts
    assert trace.prefills == 1 and trace.prompt_lengths == [101]
    assert {layer: kept.shape[1] for layer, kept in trace.kept_positions.items()} == {n: counts[n] for n in (1, 3, 4)}
    for stage, before in zip(CONFIG.layers, (0, 1, 3), strict=True):
        visible = trace.kept_positions[before] if before else torch.arange(101)[None]
        assert torch.equal(trace.scored_positions[stage], visible)
        assert set(range(2)) <= set(trace.kept_positions[stage][0].tolist())
        assert torch.equal(trace.kept_positions[stage][0, -4:], torch.arange(97, 101))
    if FAMILIES[family].get("sliding_window") is None:
        held = [count + 3 for count in counts]  # the last generated token was not run
        assert cache_lengths(cache_in(out))[1:] == held[1:], "keys of the tokens that asked are still there"
    _assert_equals_reference(model, out, trace, 101)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_chunks_that_keep_what_one_forward_keeps_give_what_it_gives(tiny_model, positions):
    model, prompt = model_of(tiny_model), tokens_of(90)
    config = CONFIG.replace(positions=positions)
    with token_pruning(model, config, scorers.random(3)) as chunked:
        found = model.generate(prompt, max_new_tokens=6, prefill_chunk_size=25, **TOLD)
    wanted = {layer: torch.zeros(1, 90).scatter(1, kept, 1.0) for layer, kept in chunked.kept_positions.items()}
    with token_pruning(model, config, scorers.given(wanted)) as whole:
        expected = model.generate(prompt, max_new_tokens=6, **TOLD)
    for layer in CONFIG.layers:
        assert torch.equal(chunked.kept_positions[layer], whole.kept_positions[layer])
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert chunked.kv_bytes_per_layer == whole.kv_bytes_per_layer
    for mine, other in zip(cache_in(found).layers, cache_in(expected).layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys)


def test_one_chunk_is_one_forward_bit_for_bit(tiny_model):
    model, prompt = model_of(tiny_model), tokens_of(60)
    with token_pruning(model, CONFIG, scorers.attention(4)):
        plain = model.generate(prompt, max_new_tokens=5, **TOLD)
        for size in (60, 100):
            chunk = model.generate(prompt, max_new_tokens=5, prefill_chunk_size=size, **TOLD)
            assert torch.equal(torch.stack(chunk.logits), torch.stack(plain.logits))


@pytest.mark.parametrize(
    ("family", "backend", "shortest"),
    [("llama", "sdpa", 24), ("llama", "eager", 24), ("gemma3_text", "sdpa", 24), ("mistral", "eager", 24),
     ("gpt2", "sdpa", 24), ("bloom", "eager", 24)],
)  # fmt: skip
def test_rows_of_a_batch_equal_the_reference_also_where_a_chunk_is_all_padding(tiny_model, family, backend, shortest):
    model = model_of(tiny_model, family, attn_implementation=backend)
    if backend == "eager":  # its softmax is in float32, where the lowest float64 is -inf and padding NaN, unpruned too
        model = model.float()
    rows = [tokens_of(100, 1), tokens_of(90, 2), tokens_of(shortest, 3)]
    ids = torch.cat([torch.nn.functional.pad(row, (100 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(100) >= 100 - row.shape[1]).long() for row in rows])
    with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, prefill_chunk_size=30, **TOLD)
    lengths = [100, 90, shortest]
    assert trace.prompt_lengths == lengths
    assert trace.tokens_per_row.T.tolist() == [tokens_per_layer(CONFIG, 6, n) for n in lengths]
    for row, tokens in enumerate(lengths):
        kept = trace.kept_positions[4][row]
        assert (kept >= 0).sum() == tokens_per_layer(CONFIG, 6, tokens)[4]
        _assert_equals_reference(model, out, trace, tokens, row, padding=100 - tokens)


def test_beams_and_several_answers_continue_one_prompt_in_chunks(tiny_model):
    model, prompt = model_of(tiny_model), tokens_of(80)
    with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        beams = model.generate(prompt, max_new_tokens=4, num_beams=3, do_sample=False, prefill_chunk_size=30)
        assert trace.prompt_lengths == [80] * 3
        torch.manual_seed(0)
        many = model.generate(prompt, max_new_tokens=4, num_return_sequences=2, do_sample=True, prefill_chunk_size=30)
    assert beams.shape == (1, 84) and many.shape == (2, 84)
    kept = trace.kept_positions[4]
    assert torch.equal(kept[0], kept[1])


def test_protected_tokens_stay_and_budgets_are_the_whole_prompts(tiny_model):
    model, prompt = model_of(tiny_model), tokens_of(100)
    protect = torch.zeros(1, 100, dtype=torch.bool)
    protect[0, 28:45] = True
    with token_pruning(model, CONFIG, scorers.random(), protect=protect) as trace:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        counts = trace.tokens_per_layer
        out = model.generate(prompt, max_new_tokens=3, prefill_chunk_size=30, **TOLD)
        assert trace.tokens_per_layer == counts
    assert set(range(28, 45)) <= set(trace.kept_positions[4][0].tolist())
    _assert_equals_reference(model, out, trace, 100)


def test_a_wanted_speed_up_counts_the_whole_prompt(tiny_model):
    import sdtp_lib

    model, prompt = model_of(tiny_model), tokens_of(200)
    with sdtp_lib.token_pruning(model, "1.3x", "recency") as trace:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        counts = trace.tokens_per_layer
        model.generate(prompt, max_new_tokens=2, do_sample=False, prefill_chunk_size=64)
    assert trace.tokens_per_layer == counts and counts[-1] < 200
    assert trace.query_tokens == 3, "one token with each chunk but the last"


def test_what_a_scorer_sees_of_a_chunk(tiny_model):
    """The prompt's last tokens stand at the end at their own positions, and lengths are the whole prompt's."""
    model, prompt = model_of(tiny_model), tokens_of(100)
    seen = []

    def score(stage):
        seen.append((stage.layer_index, stage.positions[0], int(stage.prompt_lengths[0]), stage.queries))
        paid = stage.attention_from_last(5)
        held = stage.past[0].shape[2] if stage.past else 0
        assert (paid.sum(dim=-1) < 1).all() if held else (paid.sum(dim=-1) > 0.999).all()
        return paid.mean(dim=(1, 2))

    score.query_tokens = 5
    with token_pruning(model, CONFIG, score) as trace:
        model.generate(prompt, max_new_tokens=2, do_sample=False, prefill_chunk_size=40)
    assert trace.query_tokens == 10
    first = [each for each in seen if each[0] == 1]
    assert [each[1].tolist() for each in first] == [
        [*range(40), *range(95, 100)], [*range(40, 80), *range(95, 100)], [*range(80, 100)]
    ]  # fmt: skip
    assert {each[2] for each in seen} == {100}
    assert [each[3] for each in first] == [5, 5, None]


def test_tokens_that_ask_change_nothing_but_the_scores(tiny_model):
    """Another end of the prompt: with scores that do not look at it the earlier chunks' keys stay as they were."""
    model = model_of(tiny_model, "mistral")
    caches = []
    for end in (tokens_of(20, 8), tokens_of(20, 9)):
        with token_pruning(model, CONFIG, scorers.random()):
            out = model.generate(
                torch.cat([tokens_of(60), end], dim=1), max_new_tokens=1, prefill_chunk_size=20, **TOLD
            )
        caches.append(cache_in(out))
    for mine, other in zip(*(cache.layers for cache in caches), strict=True):
        before_the_end = min(mine.keys.shape[2], 8)
        assert torch.equal(mine.keys[:, :, :before_the_end], other.keys[:, :, :before_the_end])


def test_learned_pruners_score_chunks_with_the_distances_of_the_whole_prompt(tiny_model):
    model, prompt = model_of(tiny_model), tokens_of(120)
    torch.manual_seed(0)
    pruners = TokenPruners.for_model(model, (1, 3, 4), features=("hidden", "distance", "query", "attention", "memory"))
    assert pruners.query_tokens == 16
    with token_pruning(model, CONFIG, pruners) as trace:
        out = model.generate(prompt, max_new_tokens=3, prefill_chunk_size=50, **TOLD)
    _assert_equals_reference(model, out, trace, 120)
    only_distance = TokenPruners.for_model(model, (1, 3, 4), features=("hidden", "distance"))
    with torch.no_grad():
        for stage in only_distance.stages.values():  # its place in the prompt alone
            for parameter in stage.parameters():
                parameter.zero_()
            stage.skip.weight.copy_(torch.arange(1.0, 9.0)[None])
    scores = []
    with token_pruning(model, CONFIG, only_distance) as trace:
        for size in (50, 120):
            model.generate(prompt, max_new_tokens=1, do_sample=False, prefill_chunk_size=size)
            scores.append(trace.scores[1])
    torch.testing.assert_close(*scores)


def test_attention_as_an_input_counts_in_even_shares_of_all_keys(tiny_model):
    """A uniform reader pays 1 over all keys to each: times the keys over the chunk's tokens an even share is even."""
    model, prompt = model_of(tiny_model), tokens_of(100)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    masses = []

    def score(stage):
        masses.append(stage.attention_mass((0,) if stage.layer_index == 1 else (stage.layer_index - 1,), 1))
        return stage.positions.float()

    with token_pruning(model, CONFIG, score):
        model.generate(prompt, max_new_tokens=1, do_sample=False, prefill_chunk_size=40)
    for mass in masses:
        torch.testing.assert_close(mass, torch.full_like(mass, 1 / mass.shape[1]))


def test_after_a_cached_prefix_and_in_turns_and_in_copies(tiny_model):
    """``prune="every"`` in chunks behind a prefix and in the next turn, on a copy of the cache."""
    for family in ("llama", "mistral", "gpt2"):
        model = model_of(tiny_model, family)
        config = CONFIG.replace(prune="every", min_prompt_tokens=8)
        cache = DynamicCache(config=model.config)
        system, first, second = tokens_of(50, 1), tokens_of(64, 2), tokens_of(70, 3)
        with torch.no_grad():
            model(input_ids=system, **cache_argument(model, cache))
        visible = torch.ones(6, 400, dtype=torch.bool)
        with token_pruning(model, config, scorers.attention(4)) as trace:
            ids = torch.cat([system, first], dim=1)
            out = model.generate(ids, **cache_argument(model, cache), max_new_tokens=4, prefill_chunk_size=25, **TOLD)
            assert trace.prompt_lengths == [64]
            _hide(visible, 50, trace)
            branch = copy.deepcopy(cache_in(out))
            longer = torch.cat([out.sequences, second], dim=1)
            for kept in (branch, cache_in(out)):
                again = model.generate(
                    longer, **cache_argument(model, kept), max_new_tokens=4, prefill_chunk_size=30, **TOLD
                )
        assert trace.prefills == 3 and trace.prompt_lengths == [71]
        _hide(visible, 117, trace)
        expected = masked_logits(eager_copy(model), again.sequences[0], visible[:, : again.sequences.shape[1]])
        assert_logits_equal(torch.stack(again.logits, dim=1)[0].to(torch.float64), expected[187:191])


def _hide(visible, start, trace):
    for stage, kept in sorted(trace.kept_positions.items()):
        visible[stage:, start : start + trace.prompt_lengths[0]] = False
        visible[stage:, start + kept[0]] = True


def test_a_prefix_is_left_as_it_is_and_said_so_where_later_tokens_are_not_pruned(tiny_model):
    model = model_of(tiny_model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens_of(20, 1), **cache_argument(model, cache))
    ids = torch.cat([tokens_of(20, 1), tokens_of(60, 2)], dim=1)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with pytest.warns(UserWarning, match="nothing is pruned"), token_pruning(model, CONFIG, scorers.attention(4)):
        found = model.generate(
            ids, **cache_argument(model, cache), max_new_tokens=4, do_sample=False, prefill_chunk_size=25
        )
    assert torch.equal(found, expected)


def test_short_prompts_are_left_whole_and_counted_whole(tiny_model):
    model, prompt = model_of(tiny_model), tokens_of(60)
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with token_pruning(model, CONFIG.replace(min_prompt_tokens=61), scorers.attention(4)) as trace:
        found = model.generate(prompt, max_new_tokens=5, do_sample=False, prefill_chunk_size=20)
    assert torch.equal(found, expected)
    assert trace.tokens_per_layer == [60] * 6
    assert "shorter than min_prompt_tokens" in trace.not_pruned


def test_a_chunk_may_keep_nothing(tiny_model):
    model, prompt = model_of(tiny_model), tokens_of(100)
    config = PruningConfig((2,), keep_tokens=6, sink_tokens=0, local_ratio=0.0, min_local_tokens=6)
    with token_pruning(model, config, scorers.random()) as trace:
        out = model.generate(prompt, max_new_tokens=3, prefill_chunk_size=30, **TOLD)
    assert trace.kept_positions[2].tolist() == [[*range(94, 100)]]
    _assert_equals_reference(model, out, trace, 100)


def test_sizes_of_chunks_are_read_wherever_generate_reads_them(tiny_model, recwarn):
    from transformers import GenerationConfig

    model, prompt = model_of(tiny_model), tokens_of(60)
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, prefill_chunk_size=19)
    with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
        by_name = model.generate(input_ids=prompt, generation_config=settings)
        assert trace.query_tokens == 12 and settings.prefill_chunk_size == 19
        by_place = model.generate(prompt, settings)
        assert trace.query_tokens == 12
        plain = model.generate(prompt, max_new_tokens=2, do_sample=False)
        assert trace.query_tokens == 0
    assert torch.equal(by_name, by_place) and plain.shape == by_name.shape
    assert not [each for each in recwarn if "deprecated" in str(each.message)]


def test_counts_of_chunks_add_up_within_what_each_has():
    draw = random.Random(0)
    for _ in range(300):
        total = draw.randrange(1, 400)
        bounds = sorted({0, total, *(draw.randrange(total + 1) for _ in range(draw.randrange(6)))})
        config = PruningConfig(
            (1, 2, 4), draw.choice([0.05, 0.3, 0.7, 1.0]), sink_tokens=draw.choice([0, 4, 30]),
            local_ratio=draw.choice([0.0, 0.1, 0.5]), min_local_tokens=draw.choice([0, 16]) or 1,
            min_prompt_tokens=draw.choice([0, 100]),
        )  # fmt: skip
        counts, _ = chunk_counts(config, 6, bounds)
        assert [sum(layer) for layer in counts] == tokens_per_layer(config, 6, total)
        assert counts[0] == [end - start for start, end in pairwise(bounds)]
        for before, after in pairwise(counts):
            assert all(0 <= now <= then for then, now in zip(before, after, strict=True))
    assert shared_out(7, [1, 0, 1], [5, 4, 3]) == [3, 2, 2]


def test_the_example_of_the_plan():
    config = PruningConfig((4,), 0.6, sink_tokens=4, local_ratio=0.0, min_local_tokens=16)
    counts, local = chunk_counts(config, 6, [0, 40, 80, 100])
    assert counts[4] == [22, 20, 18] and local == {4: 16}


def test_the_last_chunk_holds_the_tokens_that_ask():
    assert chunk_size(100, 40, 16) == 40
    assert chunk_size(101, 50, 16) == 42, "50 would leave one token for the last chunk, 42 leaves 17"
    with pytest.raises(ValueError, match="give 32 or more"):
        chunk_size(100, 8, 16)
