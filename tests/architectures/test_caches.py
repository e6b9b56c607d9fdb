"""What models call their cache: transformers 5.24 renamed it, and our own calls use the name that a model has."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from sdtp_lib.architectures.caches import cache_argument, cache_in


@pytest.fixture
def said(caplog):
    """What transformers logs: it deprecates with its own logger as well as with warnings."""
    transformers.utils.logging.warning_once.cache_clear()  # else only the first test of a process would see it
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neox", "mixtral"])
def test_a_cache_goes_in_and_comes_out_without_a_word_of_deprecation(tiny_model, said, family):
    model, prompt = tiny_model(family), torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=prompt, use_cache=True)
    first = model(input_ids=prompt[:, :8], use_cache=True)
    rest = model(input_ids=prompt[:, 8:], **cache_argument(model, cache_in(first)), use_cache=True)
    torch.testing.assert_close(rest.logits, whole.logits[:, 8:], rtol=0, atol=1e-5)
    assert cache_in(rest) is cache_in(first) and cache_in(rest).get_seq_length() == 12
    ids = model.generate(prompt, **cache_argument(model, DynamicCache()), max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=3, do_sample=False))
    assert said() == []


def test_an_output_without_a_cache_has_none(tiny_model, said):
    assert cache_in(tiny_model()(torch.arange(3, 9)[None], use_cache=False)) is None
    assert cache_in(CausalLMOutputWithPast(logits=torch.zeros(1))) is None
    assert said() == []


def test_a_model_is_called_by_the_name_that_its_own_forward_has():
    class Old(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None): ...

    class New(torch.nn.Module):
        def forward(self, input_ids, cache=None, **kwargs): ...

    assert cache_argument(Old(), 1) == {"past_key_values": 1}
    assert cache_argument(New(), 1) == {"cache": 1}


def test_a_wrapper_that_takes_anything_is_called_by_the_name_of_the_model_within(tiny_model):
    class Wrapper(torch.nn.Module):
        def forward(self, *args, **kwargs): ...

    assert cache_argument(Wrapper(), 1) == cache_argument(tiny_model(), 1)
