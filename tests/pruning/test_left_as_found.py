"""After a `with` the model is as it was, whatever happened inside; and nothing stays in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sdtp_lib import PruningConfig, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_in
from tests.pruning.model_state import hooks_of

CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.arange(3, 67)[None]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_leaves_the_model_as_it_was(tiny_model, error):
    model = tiny_model()
    plain, before = model(input_ids=PROMPT).logits, hooks_of(model)

    def scorer(stage):
        if stage.layer_index == 3:
            raise error("stop")
        return stage.positions.float()

    with pytest.raises(error), token_pruning(model, CONFIG, scorer):
        inside = hooks_of(model)
        model(input_ids=PROMPT)
    assert inside != before
    assert hooks_of(model) == before
    assert torch.equal(model(input_ids=PROMPT).logits, plain)


def test_a_failed_prefill_does_not_spoil_the_next_one_in_the_same_with(tiny_model):
    model, failing = tiny_model(), [True]

    def scorer(stage):
        if stage.layer_index == 3 and failing:
            failing.pop()
            raise RuntimeError("once")
        return stage.positions.float()

    with torch.no_grad(), token_pruning(model, CONFIG, scorer) as trace:
        with pytest.raises(RuntimeError, match="once"):
            model(input_ids=PROMPT)
        logits = model(input_ids=PROMPT).logits
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        assert torch.equal(model(input_ids=PROMPT).logits, logits)
    assert trace.tokens_per_layer == [64, 38, 38, 22, 22, 22]


def test_a_generator_left_half_way_gives_the_model_back(tiny_model):
    model = tiny_model()
    before = hooks_of(model)

    def tokens():
        with token_pruning(model, CONFIG, scorers.recency()):
            for _ in range(5):
                yield model(input_ids=PROMPT).logits.shape

    stream = tokens()
    next(stream)
    assert hooks_of(model) != before
    stream.close()
    assert hooks_of(model) == before


def test_a_thousand_entries_leave_nothing_behind(tiny_model):
    model, prompt = tiny_model(num_hidden_layers=3, hidden_size=16), PROMPT[:, :40]
    before = hooks_of(model)
    config = PruningConfig(layers=(1,), keep_ratio=0.5, min_local_tokens=4)
    with torch.no_grad(), token_pruning(model, config, scorers.recency()) as trace:
        cache = cache_in(model(input_ids=prompt, use_cache=True))
    gone = weakref.ref(cache)
    del cache
    for _ in range(1000):
        with token_pruning(model, config, scorers.recency()):
            pass
    gc.collect()
    assert gone() is None, "something still holds a cache"
    tensors = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
    for _ in range(50):
        with torch.no_grad(), token_pruning(model, config, scorers.recency()):
            model(input_ids=prompt)
    gc.collect()
    assert sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()) == tensors
    assert hooks_of(model) == before
    assert trace.prefills == 1
