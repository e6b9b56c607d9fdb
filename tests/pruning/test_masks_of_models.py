"""What transformers put into a mask holds for kept tokens too: windows, alibi, packed sequences, a model's own pattern.

The reference is the plain model at full length with the dropped keys taken out of whatever mask its layers are handed.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.reference import louder

CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4, local_ratio=0.0)
PROMPT = torch.randint(3, 120, (1, 64), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2}
# What each stands for: a mask that the engine could not have made from padding and window alone.
KINDS = {
    "alibi inside the mask": ("falcon", {"alibi": True}),
    "no mask, rotary": ("falcon", {"alibi": False}),
    "a mask that each layer changes by its own values": ("doge", GROUPED),
    "a window": ("mistral", {**GROUPED, "sliding_window": 24}),
    "a window in some layers": ("gemma3_text", {**GROUPED, "head_dim": 8, "sliding_window": 24}),
    "a layer that scales by position": ("ministral3", GROUPED),
    "local attention": (
        "modernbert-decoder",
        {"intermediate_size": 64, "local_attention": 48, "cls_token_id": 1, "sep_token_id": 2},
    ),
}


def _model(family, extras, backend):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **extras)
    return louder(AutoModelForCausalLM.from_config(config, attn_implementation=backend, dtype=torch.float64).eval())


def _layers(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 6)


def _with_dropped_keys_masked(model, ids, kept, **arguments):
    """Logits (T, V) at full length; from a stage on, no token sees a dropped key but itself."""
    total = ids.shape[1]
    seen = torch.ones(6, total, dtype=torch.bool)
    for stage, positions in sorted(kept.items()):
        seen[stage:, :64] = False
        seen[stage:, positions[0]] = True
    causal = torch.ones(total, total, dtype=torch.bool).tril()

    def hide(index):
        def hook(_module, args, kwargs):
            allowed = seen[index][None] | torch.eye(total, dtype=torch.bool)
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = (causal & allowed)[None, None]
            elif mask.dtype == torch.bool:
                mask = mask & allowed
            else:
                mask = mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        layer.register_forward_pre_hook(hide(index), with_kwargs=True) for index, layer in enumerate(_layers(model))
    ]
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, **arguments).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_decode_and_a_second_turn_equal_the_model_with_dropped_keys_masked(kind, backend):
    model = _model(*KINDS[kind], backend)
    if KINDS[kind][0] == "doge" and backend == "sdpa" and transformers.__version__.startswith("5.2."):
        # This release's Doge makes its mask within the layer, where it cannot be cut: the model's own check says so.
        with pytest.raises(PruningNotSupported, match="did not pass the check"):
            token_pruning(model, CONFIG, "recency").__enter__()
        return
    new = torch.randint(3, 120, (1, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.random(3)) as trace:
        out = model(input_ids=PROMPT, use_cache=True)
        logits, cache = [out.logits[0]], cache_in(out)
        for piece in new.split((1, 1, 4, 1), dim=1):
            logits.append(model(input_ids=piece, **cache_argument(model, cache)).logits[0])
    expected = _with_dropped_keys_masked(model, torch.cat([PROMPT, new], dim=1), trace.kept_positions)
    last = trace.kept_positions[3][0]
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits[0], expected[last], rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(torch.cat(logits[1:]), expected[64:], rtol=0, atol=1e-6 * scale)
    plain = model(input_ids=torch.cat([PROMPT, new], dim=1), use_cache=False).logits[0]
    assert (plain[64:] - expected[64:]).abs().max() > 1e-4 * scale, "the reference would not notice missing tokens"


def test_packed_sequences_do_not_see_each_other_after_a_cut():
    model = _model("llama", GROUPED, "sdpa")
    positions = torch.cat([torch.arange(32), torch.arange(32)])[None]
    other = PROMPT.clone()
    other[0, 8:28] = PROMPT[0, 8:28].flip(0)
    found = []
    for ids in (PROMPT, other):
        with torch.no_grad(), token_pruning(model, CONFIG, scorers.random(3)) as trace:
            found.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -1])
    assert torch.equal(*found)
    expected = _with_dropped_keys_masked(model, PROMPT, trace.kept_positions, position_ids=positions)
    torch.testing.assert_close(found[0], expected[-1])


def test_a_bidirectional_layer_sees_all_kept_tokens_and_only_those():
    # Without `verify`, which asks for decode steps too: a model that looks ahead has none that equal a whole forward.
    model = _model("gemma3_text", {**GROUPED, "head_dim": 8, "use_bidirectional_attention": True}, "sdpa")
    assert PROMPT.shape[1] < 2 * model.config.sliding_window
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.random(3), verify="never") as trace:
        found = model(input_ids=PROMPT, use_cache=False).logits[0]
    seen = torch.ones(6, 64, dtype=torch.bool)
    for stage, kept in sorted(trace.kept_positions.items()):
        seen[stage:] = False
        seen[stage:, kept[0]] = True
    with torch.no_grad():
        plain = model(input_ids=PROMPT, use_cache=False).logits[0]
        changed = PROMPT.clone()
        changed[0, -1] = PROMPT[0, -1] % 100 + 7
        after = model(input_ids=changed, use_cache=False).logits[0]
    assert (after[0] - plain[0]).abs().max() > 1e-6, "this model looks ahead"
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.random(3), verify="never"):
        moved = model(input_ids=changed, use_cache=False).logits[0]
    assert (moved[0] - found[0]).abs().max() > 1e-6, "and so do its kept tokens"
