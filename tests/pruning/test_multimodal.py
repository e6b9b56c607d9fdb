"""Language models inside multimodal ones: text is pruned as ever, and what stands for an image is never dropped."""

from __future__ import annotations

import family_models
import pytest
import torch
import transformers
from family_checks import CHECKS, ENGINE
from family_subject import RIGHT, Subject, judged

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures import describe

CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.5, min_local_tokens=2, local_ratio=0.0)
IMAGE = 120  # above the ids that a `Subject` draws


def _gemma():
    if "gemma3" not in family_models.families():
        pytest.skip("this transformers has no gemma3")
    model = family_models.tiny_model("gemma3", "sdpa")
    if model.config.get_text_config() is model.config:
        pytest.skip("this transformers builds gemma3's language model alone")
    model.config.image_token_index = model.config.image_token_id = IMAGE
    return model


def _qwen():
    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE,
                                           video_token_id=121, vision_start_token_id=122)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return model.to(torch.float64).eval().requires_grad_(False)


def _carries_positions_over(model) -> bool:
    """Whether one row fails after a padded batch of two, nothing pruned: Qwen2.5-VL of transformers 5.2."""
    rows, mask = torch.arange(5, 21)[None].repeat(2, 1), torch.ones(2, 16, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        model.generate(rows, attention_mask=mask, max_new_tokens=1, pad_token_id=0)
        try:
            model(input_ids=rows[:1])
        except RuntimeError:
            return True
    return False


MODELS = {"gemma3": _gemma, "qwen2_5_vl": _qwen}


@pytest.mark.parametrize("check", ENGINE)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_text_prompt_equals_the_masked_reference(build, check):
    if check == "padded" and _carries_positions_over(build()):
        pytest.skip("this transformers' model takes a batch's positions for the next call's, without pruning too")
    found = judged(CHECKS[check], Subject(build()))
    assert found.outcome == RIGHT, found


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_what_stands_for_an_image_is_never_dropped(build):
    model = build()
    assert IMAGE in describe(model).placeholders
    tokens = torch.arange(5, 69)[None].repeat(2, 1)
    tokens[0, 20:28] = IMAGE
    mask = torch.ones_like(tokens)
    mask[1, :10] = 0
    protect = torch.zeros_like(tokens, dtype=torch.bool)
    protect[1, 30] = True
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency(), protect=protect) as trace:
        model(input_ids=tokens, attention_mask=mask)
    assert set(range(20, 28)) <= set(trace.kept_positions[3][0].tolist())
    assert 30 - 10 in trace.kept_positions[3][1].tolist(), "and what the caller protects stays as well"
    assert 20 not in trace.kept_positions[1][1].tolist() or 21 not in trace.kept_positions[1][1].tolist()


def test_embeddings_alone_are_refused_since_they_hide_what_is_an_image():
    model = _gemma()
    embeddings = model.get_input_embeddings()(torch.arange(5, 69)[None])
    with (
        torch.no_grad(),
        token_pruning(model, CONFIG, scorers.recency()),
        pytest.raises(PruningNotSupported, match="which of them stand for images is not known"),
    ):
        model(inputs_embeds=embeddings)


def test_hooks_and_the_cache_are_as_before_after_an_exception():
    model = _gemma()
    tokens = torch.arange(5, 69)[None]
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        output = model(input_ids=tokens, use_cache=True)
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    assert not cache.inside
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(PruningNotSupported, match="inside"):
        model(input_ids=tokens, **{"cache" if "cache" in output else "past_key_values": cache})
