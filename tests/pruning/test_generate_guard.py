"""Settings of ``generate`` that cannot go with pruning are refused before any compute, however they are handed over."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import GenerationConfig, StaticCache

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures import decoder_layers
from sdtp_lib.architectures.caches import cache_argument

CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.arange(3, 67)[None]
LENGTH = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}

REFUSED = [
    ({"prefill_chunk_size": 16, "cache_implementation": "quantized"},
     "prefill_chunk_size=16 .*cache_implementation='quantized'.*use 'dynamic'"),
    ({"prompt_lookup_num_tokens": 3}, "assisted decoding.*prompt_lookup_num_tokens=3.*leave it out"),
    ({"assistant_early_exit": 2}, "assisted decoding.*assistant_early_exit=2.*leave it out"),
    ({"use_cache": False}, "use_cache=False .*leave use_cache out"),
    ({"cache_implementation": "static"}, "cache_implementation='static' .*use 'dynamic'"),
    ({"cache_implementation": "offloaded_static"}, "cache_implementation='offloaded_static' .*use 'dynamic'"),
    ({"cache_implementation": "sliding_window"}, "cache_implementation='sliding_window' .*use 'dynamic'"),
    ({"cache_implementation": "paged"}, "cache_implementation='paged' .*leave cache_implementation out"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 .*contrastive search.*use greedy search"),
    ({"dola_layers": "low"}, "dola_layers='low' .*dola generation.*use greedy search"),
]  # fmt: skip
IDS = ["-".join(f"{name}={value}" for name, value in settings.items()) for settings, _ in REFUSED]


@contextlib.contextmanager
def nothing_computed(model):
    calls = []
    handle = decoder_layers(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield
    finally:
        handle.remove()
    assert not calls, "something was computed before the refusal"


def refused(model, match, act):
    with (
        nothing_computed(model),
        pytest.raises(PruningNotSupported, match=match),
        token_pruning(model, CONFIG, scorers.recency()),
    ):
        act(model)


@pytest.mark.parametrize(("settings", "match"), REFUSED, ids=IDS)
def test_a_setting_is_refused_by_keyword(tiny_model, settings, match):
    refused(tiny_model(), match, lambda model: model.generate(PROMPT, **LENGTH, **settings))


@pytest.mark.parametrize(("settings", "match"), REFUSED, ids=IDS)
def test_a_setting_is_refused_in_a_configuration_at_second_place_by_keyword_and_of_the_model_itself(
    tiny_model, settings, match
):
    model, config = tiny_model(), GenerationConfig(**LENGTH, **settings)
    refused(model, match, lambda model: model.generate(PROMPT, config))
    refused(model, match, lambda model: model.generate(PROMPT, generation_config=config))
    model.generation_config = config
    refused(model, match, lambda model: model.generate(PROMPT))


def test_an_assistant_model_is_refused_at_its_place_and_by_keyword(tiny_model):
    model, drafts = tiny_model(), tiny_model(seed=1)
    match = "assisted decoding.*assistant_model='LlamaForCausalLM'"
    refused(model, match, lambda model: model.generate(PROMPT, assistant_model=drafts, **LENGTH))
    refused(model, match, lambda model: model.generate(PROMPT, None, None, None, None, None, drafts, **LENGTH))


def test_a_keyword_overrides_what_the_configuration_asks_for(tiny_model):
    model = tiny_model()
    model.generation_config.cache_implementation = "static"
    with token_pruning(model, CONFIG, scorers.recency()) as trace:
        model.generate(PROMPT, cache_implementation="dynamic", **LENGTH)
    assert trace.tokens_per_layer == [64, 38, 38, 22, 22, 22]


@pytest.mark.parametrize("implementation", ["hybrid", "dynamic", None])
def test_what_transformers_turns_into_the_dynamic_cache_is_served(tiny_model, implementation):
    model = tiny_model("gemma2", sliding_window=24, query_pre_attn_scalar=8)
    with token_pruning(model, CONFIG, scorers.recency()):
        plain = model.generate(PROMPT, **LENGTH)
    model.generation_config.cache_implementation = implementation
    with token_pruning(model, CONFIG, scorers.recency()) as trace:
        assert torch.equal(model.generate(PROMPT, **LENGTH), plain)
    assert trace.tokens_per_layer == [64, 38, 38, 22, 22, 22]


def test_drafting_that_transformers_leaves_out_under_beam_search_is_not_refused(tiny_model):
    model = tiny_model()
    with token_pruning(model, CONFIG, scorers.recency()) as trace:
        model.generate(PROMPT, prompt_lookup_num_tokens=3, num_beams=2, **LENGTH)
    assert trace.prefills == 1


def test_lists_of_lists_among_the_settings_are_not_taken_for_a_cache(tiny_model):
    model = tiny_model()
    with token_pruning(model, CONFIG, scorers.recency()) as trace:
        model.generate(PROMPT, bad_words_ids=[[5, 6]], **LENGTH)
    assert trace.prefills == 1


def test_decoding_code_from_the_hub_is_refused_and_a_function_is_not(tiny_model):
    hub = "custom_generate='someone/recipe' .*as a function"
    refused(tiny_model(), hub, lambda model: model.generate(PROMPT, custom_generate="someone/recipe", **LENGTH))

    def loop(model, input_ids, **model_kwargs):
        cache = {name: model_kwargs[name] for name in ("cache", "past_key_values") if name in model_kwargs}
        return model(input_ids, **cache, use_cache=True).logits[:, -1]

    model = tiny_model()
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()) as trace:
        assert model.generate(PROMPT, custom_generate=loop, **LENGTH).shape == (1, 128)
    assert trace.tokens_per_layer[-1] == 22


def test_continuous_batching_is_refused_through_all_its_doors(tiny_model):
    match = "continuous batching.*padded on the left"
    refused(tiny_model(), match, lambda model: model.generate_batch([[3, 4, 5]], GenerationConfig(**LENGTH)))
    refused(tiny_model(), match, lambda model: model.init_continuous_batching())

    def context(model):
        with model.continuous_batching_context_manager():
            pass

    refused(tiny_model(), match, context)


def test_a_static_cache_among_the_arguments_is_refused(tiny_model):
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=128)
    given = cache_argument(model, cache)
    refused(model, "StaticCache.*dynamic", lambda model: model.generate(PROMPT, **given, **LENGTH))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks, newer transformers warns
def test_under_peft_both_generates_are_guarded_and_both_are_given_back(tiny_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"])).eval()
    inner = model.get_base_model()
    for way in (model, model.base_model, inner):
        refused(model, "use_cache=False", lambda _, way=way: way.generate(input_ids=PROMPT, use_cache=False))
    with token_pruning(model, CONFIG, scorers.recency()) as trace:
        assert "generate" in vars(inner)
        model.generate(input_ids=PROMPT, **LENGTH)
        assert trace.tokens_per_layer == [64, 38, 38, 22, 22, 22]
        inner.generate(PROMPT, **LENGTH)
        assert trace.prefills == 2
    assert not {"generate", "init_continuous_batching"} & (vars(model).keys() | vars(inner).keys())


def test_a_generate_that_the_model_object_had_of_its_own_is_called_and_given_back(tiny_model):
    model, seen = tiny_model(), []

    def own(inputs, **kwargs):
        seen.append(kwargs)
        return type(model).generate(model, inputs, **kwargs)

    model.generate = own
    with token_pruning(model, CONFIG, scorers.recency()):
        model.generate(PROMPT, **LENGTH)
        with pytest.raises(PruningNotSupported, match="use_cache=False"):
            model.generate(PROMPT, use_cache=False)
    assert vars(model)["generate"] is own
    assert seen == [LENGTH]
