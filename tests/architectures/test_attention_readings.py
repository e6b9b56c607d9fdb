"""Attention read without a T x T tensor against the weights that layers show, windows and own functions included."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from sdtp_lib import PruningConfig, PruningNotSupported, TokenPruners, scorers, token_pruning
from sdtp_lib.architectures.attention_readings import attention_in_forward, attention_of_earlier_layers
from sdtp_lib.training.labels import saliency_of

PROMPT = torch.randint(3, 120, (1, 48), generator=torch.Generator().manual_seed(1))
CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4, local_ratio=0.0)
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "sliding_window": 12,
}  # fmt: skip
READ = ("llama", "mistral", "ministral3", "olmo3", "gemma2", "gemma3_text", "gpt_oss", "granite_swa", "doge", "bloom",
        "gpt_neox", "phi3", "cohere2", "bert")  # fmt: skip
UNREADABLE = ("falcon", "gpt_neox_japanese")
OWN_FIELDS = {
    "bert": {"is_decoder": True, "sliding_window": None},
    "falcon": {"head_dim": None, "num_key_value_heads": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.fixture
def model_of():
    """A tiny model whose attention matters, with windows shorter than the prompt where the family has any."""

    def build(family: str, backend: str | None = None, **changes):
        if family not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {family}")
        fields = {**SIZES, **OWN_FIELDS.get(family, {}), **changes}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{name: value for name, value in fields.items() if value is not None})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=backend, dtype=torch.float32)
        model.eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in name for part in ("embed", "wte", "wpe")):
                parameter.mul_(5)
        return model

    return build


@pytest.mark.parametrize("family", READ)
def test_what_is_read_is_what_the_layer_pays(model_of, family):
    model = model_of(family, "eager")
    layers = range(model.config.num_hidden_layers)
    with torch.no_grad(), attention_in_forward(model, layers, 5, lambda _, paid: paid) as read:
        shown = model(PROMPT, use_cache=False, output_attentions=True).attentions
    for layer in layers:
        torch.testing.assert_close(read[layer], shown[layer][:, :, -5:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in READ if family != "bert"])
def test_attention_scores_of_a_prefill_are_the_attention_paid_there(model_of, family):
    """A layer's window was ignored: 0.62 of a Mistral's scored attention lay where the layer pays none."""
    model = model_of(family, "eager")
    with torch.no_grad():
        paid = model(PROMPT, use_cache=False, output_attentions=True).attentions[1][:, :, -4:].mean(dim=(1, 2))
        with token_pruning(model, CONFIG, scorers.attention(4)) as trace:
            model(PROMPT)
    torch.testing.assert_close(trace.scores[1], paid, rtol=1e-4, atol=1e-6)
    if family in ("mistral", "ministral3"):
        assert trace.scores[1][0, : 48 - 4 - 12 + 1].max() == 0, "no query sees these"


def test_sdpa_pays_what_eager_pays(model_of):
    found = []
    for backend in ("eager", "sdpa"):
        model = model_of("ministral3", backend)
        with torch.no_grad(), attention_in_forward(model, (1, 4), 5, lambda _, paid: paid) as read:
            model(PROMPT, use_cache=False)
        found.append(read)
    for layer in (1, 4):
        torch.testing.assert_close(found[0][layer], found[1][layer], rtol=1e-4, atol=1e-6)


def test_packed_sequences_pay_nothing_to_each_other(model_of):
    model, starts = model_of("llama", "sdpa"), torch.cat([torch.arange(24), torch.arange(24)])[None]
    with torch.no_grad(), attention_in_forward(model, (1,), 5, lambda _, paid: paid) as read:
        model(PROMPT, position_ids=starts, use_cache=False)
    assert read[1][..., :24].max() == 0 and read[1][..., 24:].max() > 0


@pytest.mark.parametrize("family", UNREADABLE)
def test_families_that_show_nothing_are_refused_by_name_before_any_compute(model_of, family):
    model, calls = model_of(family, "eager"), []
    with (
        pytest.raises(PruningNotSupported, match="attention cannot be read.*use another scorer"),
        token_pruning(model, CONFIG, scorers.attention(4)),
    ):
        calls.append(model(PROMPT))
    pruners = TokenPruners.for_model(model, CONFIG.layers, features=("hidden", "attention"))
    with pytest.raises(PruningNotSupported, match="attention cannot be read"), token_pruning(model, CONFIG, pruners):
        calls.append(model(PROMPT))  # pruners that look at attention were refused at their first stage only
    assert not calls
    with pytest.raises(PruningNotSupported, match="attention cannot be read"):
        saliency_of(model, PROMPT, torch.ones_like(PROMPT), torch.ones_like(PROMPT), [1], "attention_entropy")


@pytest.mark.parametrize("family", ["llama", "mistral", "ministral3", "gemma3_text", "bloom"])
def test_attention_in_prompts_of_a_padded_batch_is_that_of_each_prompt_alone(model_of, family):
    model = model_of(family)
    lengths, together = (30, 48), torch.zeros(2, 48, dtype=torch.long)
    for row, length in enumerate(lengths):
        together[row, 48 - length :] = PROMPT[0, :length]
    mask = (together != 0).long()
    positions = {} if family == "bloom" else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with torch.no_grad(), attention_of_earlier_layers(model, {3: (0, 1, 2)}, 4, lambda _: mask.bool()) as found:
        model(together, attention_mask=mask, use_cache=False, **positions)
    for row, length in enumerate(lengths):
        whole = torch.ones(1, length, dtype=torch.bool)
        with torch.no_grad(), attention_of_earlier_layers(model, {3: (0, 1, 2)}, 4, lambda _, w=whole: w) as alone:
            model(PROMPT[:, :length], use_cache=False)
        torch.testing.assert_close(found[3][row, 48 - length :], alone[3][0], rtol=1e-3, atol=1e-5)
        assert found[3][row, : 48 - length].abs().sum() == 0


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3", "ministral3", "bloom", "gpt_oss"])
def test_entropy_is_that_of_the_attention_that_the_response_pays(model_of, family):
    """Ended in raw errors where a layer takes more than one table of positions."""
    model, response = model_of(family, "eager"), torch.zeros_like(PROMPT)
    response[:, 40:] = 1
    shown = model(PROMPT, use_cache=False, output_attentions=True).attentions
    found = saliency_of(model, PROMPT, torch.ones_like(PROMPT), response, [1, 3], "attention_entropy")
    for layer in (1, 3):
        paid = shown[layer][:, :, 40:]
        expected = -torch.xlogy(paid, paid).mean(1).sum(1) / 8
        torch.testing.assert_close(found[layer], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_reading_attention_keeps_no_tensor_of_the_layer_alive(tiny_model, family):
    """The exception that ends a layer at its attention call held itself and the layer's tensors in a circle."""
    seen = []

    def scorer(stage):
        seen.append(weakref.ref(stage.hidden_states))
        return stage.attention_from_last(4).mean(dim=(1, 2))

    model, config = tiny_model(family), PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), token_pruning(model, config, scorer):
            model(torch.arange(3, 67)[None], use_cache=False)
        assert [reference() is None for reference in seen] == [True, True]
    finally:
        gc.enable()
