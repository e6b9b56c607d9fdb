"""What cannot be pruned in chunks is refused before any compute, and a failure leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sdtp_lib import scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument
from sdtp_lib.config import PruningNotSupported
from tests.pruning.chunked import CONFIG, model_of, needs_chunks, tokens_of

pytestmark = needs_chunks


def test_what_cannot_be_pruned_in_chunks_is_refused_before_any_compute(tiny_model):
    from sdtp_lib import methods
    from sdtp_lib import token_pruning as by_method

    model, prompt = model_of(tiny_model), tokens_of(80)
    ran = []
    handle = model.model.register_forward_pre_hook(lambda *_: ran.append(1))

    def refused(match, with_, error=PruningNotSupported, **arguments):
        arguments = {"max_new_tokens": 2, "prefill_chunk_size": 30, "input_ids": prompt} | arguments
        with with_, pytest.raises(error, match=match):
            model.generate(**arguments)
        assert not ran

    plain = lambda **changes: token_pruning(model, CONFIG.replace(**changes), scorers.attention(4))  # noqa: E731
    refused("keep_mass", plain(keep_mass=0.9))
    refused("quantized", plain(), cache_implementation="quantized")
    refused("offloaded", plain(), cache_implementation="offloaded")
    refused("without input_ids", plain(), input_ids=None, inputs_embeds=torch.zeros(1, 80, 32, dtype=torch.float64))
    refused("prefill_chunk_size=3", plain(), ValueError, prefill_chunk_size=3)
    refused("two passes", by_method(model, methods.get("gemfilter"), verify="never"))
    refused("KV budget", by_method(model, methods.get("snapkv"), verify="never"))
    handle.remove()


def test_scorers_that_read_what_a_chunk_does_not_have_are_refused(tiny_model):
    model, prompt = model_of(tiny_model), tokens_of(80)

    def reads(window):
        return lambda stage: stage.attention_from_last(window).mean(dim=(1, 2))

    with token_pruning(model, CONFIG, reads(20)), pytest.raises(PruningNotSupported, match="query_tokens = 20"):
        model.generate(prompt, max_new_tokens=2, prefill_chunk_size=40)
    whole = lambda stage: stage.attention_received().mean(dim=1)  # noqa: E731
    with token_pruning(model, CONFIG, whole), pytest.raises(PruningNotSupported, match="later chunks"):
        model.generate(prompt, max_new_tokens=2, prefill_chunk_size=40)


def test_padding_that_generate_was_not_told_of_is_refused_or_read(tiny_model):
    model = model_of(tiny_model)
    ids = torch.cat([torch.zeros(1, 30, dtype=torch.long), tokens_of(60)], dim=1)
    with token_pruning(model, CONFIG, scorers.attention(4)), pytest.raises(PruningNotSupported, match="attention_mask"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=40, pad_token_id=0)


def test_a_failing_scorer_leaves_model_and_windows_as_they_were(tiny_model):
    model, prompt = model_of(tiny_model, "mistral"), tokens_of(80)
    expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
    cache = DynamicCache(config=model.config)

    def fails(stage):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), token_pruning(model, CONFIG, fails):
        model.generate(prompt, **cache_argument(model, cache), max_new_tokens=2, prefill_chunk_size=40)
    assert {layer.sliding_window for layer in cache.layers} == {40}
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)
    assert "generate" not in vars(model)
