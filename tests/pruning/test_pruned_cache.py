"""A pruned cache is carried about: copied, saved, reordered, used outside the ``with``, reset."""

from __future__ import annotations

import copy
import io
import sys
import threading

import pytest
import torch
from transformers import DynamicCache

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.reference import louder

CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.randint(3, 120, (1, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tiny_model):
    return louder(tiny_model())


def _prefilled(model, ids=PROMPT, **arguments):
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        return cache_in(model(input_ids=ids, use_cache=True, **arguments))


def _step(model, cache, token, **arguments):
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        return model(input_ids=token, **cache_argument(model, cache), **arguments).logits


def test_a_pruned_cache_goes_through_torch_save_and_deepcopy(model):
    cache, token = _prefilled(model), torch.tensor([[9, 8, 7]])
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    twin = copy.deepcopy(cache)
    assert isinstance(loaded, DynamicCache)
    expected = _step(model, cache, token)
    assert torch.equal(_step(model, loaded, token), expected)
    assert torch.equal(_step(model, twin, token), expected)


def _padded(rows):
    ids, mask = torch.zeros(len(rows), 64, dtype=torch.long), torch.zeros(len(rows), 64, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 64 - len(row) :], mask[index, 64 - len(row) :] = row, 1
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize(
    ("method", "argument", "order"),
    [
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
    ],
)
def test_rows_that_are_moved_take_their_record_along(model, method, argument, order):
    ids, mask, positions = _padded([PROMPT[0, 40:], PROMPT[0].flip(0)])
    cache = _prefilled(model, ids, attention_mask=mask, position_ids=positions)
    moved = copy.deepcopy(cache)
    getattr(moved, method)(argument)
    token = torch.tensor([[5], [6]])
    longer = torch.cat([mask, torch.ones_like(token)], dim=1)
    place = longer.cumsum(1)[:, -1:] - 1
    expected = _step(model, cache, token, attention_mask=longer, position_ids=place)
    found = _step(model, moved, token[order], attention_mask=longer[order], position_ids=place[order])
    torch.testing.assert_close(found, expected[order])
    assert not torch.allclose(expected[0], expected[1])


def test_what_follows_outside_the_with_is_refused_in_words_where_it_would_be_wrong(model):
    cache = _prefilled(model)
    with pytest.raises(PruningNotSupported, match=r"filled by a pruned prefill.*3 token\(s\).*inside `with"):
        model(input_ids=torch.tensor([[9, 8, 7]]), **cache_argument(model, cache))
    one = torch.tensor([[9]])
    assert torch.equal(
        model(input_ids=one, **cache_argument(model, copy.deepcopy(cache))).logits,
        _step(model, copy.deepcopy(cache), one),
    )
    model.set_attn_implementation("eager")
    with pytest.raises(PruningNotSupported, match="filled by a pruned prefill"):
        model(input_ids=one, **cache_argument(model, _prefilled(model)))


def test_a_reset_cache_is_an_ordinary_one_again(model):
    plain = cache_in(model(input_ids=PROMPT))
    plain.reset()
    if plain.get_seq_length():
        pytest.skip("this transformers' reset fills a cache with zeros and leaves its length")
    cache = _prefilled(model)
    cache.reset()
    assert type(cache) is DynamicCache
    assert torch.equal(model(input_ids=PROMPT, **cache_argument(model, cache)).logits, model(input_ids=PROMPT).logits)


def test_a_cache_filled_by_other_rows_is_refused_before_any_compute(model):
    cache = _prefilled(model)
    with pytest.raises(PruningNotSupported, match="filled by 1 rows and is continued by 2"):
        _step(model, cache, torch.tensor([[5], [6]]))


def test_a_cache_that_is_not_empty_is_said_once_and_in_the_trace(model):
    cache = DynamicCache(config=model.config)
    model(input_ids=PROMPT[:, :8], **cache_argument(model, cache))
    rest = torch.cat([PROMPT[:, :8], PROMPT.repeat(1, 2)], dim=1)
    with (
        pytest.warns(UserWarning, match="the cache held 8 token.*prefill the whole prompt inside") as said,
        token_pruning(model, CONFIG, scorers.recency()) as trace,
    ):
        model.generate(rest, **cache_argument(model, cache), max_new_tokens=3, do_sample=False)
    assert len([w for w in said if "cache held" in str(w.message)]) == 1
    assert "cache held 8" in trace.not_pruned


def test_a_short_prompt_and_its_decode_steps_say_nothing_about_the_cache(model):
    with pytest.warns(UserWarning) as said, token_pruning(model, CONFIG, scorers.recency()) as trace:
        model.generate(PROMPT[:, :5], max_new_tokens=3, do_sample=False)
    assert ["too short" in str(w.message) for w in said] == [True]
    assert "too short" in trace.not_pruned and "cache" not in trace.not_pruned


def test_integer_scores_are_scores(model):
    with torch.no_grad(), token_pruning(model, CONFIG, lambda stage: stage.positions) as by_position:
        model(input_ids=PROMPT)
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()) as by_recency:
        model(input_ids=PROMPT)
    assert torch.equal(by_position.kept_positions[3], by_recency.kept_positions[3])


def test_threads_get_the_right_answer_or_a_refusal_and_nothing_else(model):
    """The check looked first and wrote later: under a forced switch interval two threads both found the model free."""
    prompts = [torch.randint(3, 120, (1, 64), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    with token_pruning(model, CONFIG, scorers.random(3)):
        expected = [model.generate(p, max_new_tokens=4, do_sample=False) for p in prompts]
    outcomes, before = [], sys.getswitchinterval()

    def run(index):
        try:
            found = model.generate(prompts[index], max_new_tokens=4, do_sample=False)
            outcomes.append("right" if torch.equal(found, expected[index]) else "wrong")
        except PruningNotSupported as refusal:
            outcomes.append("refused" if "second thread" in str(refusal) else str(refusal))

    sys.setswitchinterval(1e-5)
    try:
        for _ in range(20):
            with token_pruning(model, CONFIG, scorers.random(3)):
                threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    finally:
        sys.setswitchinterval(before)
    assert set(outcomes) <= {"right", "refused"}
    assert "right" in outcomes
