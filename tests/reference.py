"""The slow reference: nothing is ever dropped, dropped tokens are only masked out of attention from their stage on.

Independent of the engine's arithmetic: full-length forwards without a cache, eager attention, one explicit T x T mask a
layer. It knows which tokens the engine kept (a trace's positions) and nothing else of it.
"""

from __future__ import annotations

import copy
import inspect

import torch

from sdtp_lib.architectures.layers import describe

# family -> what its tiny config needs beyond the shared sizes; windows are shorter than the prompts
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "gpt_neox": {},
    "gpt2": {"n_positions": 512, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 64},
    "bloom": {},
}


def louder(model):
    """Weights large enough that attention matters: with transformers' 0.02 a random model hardly looks back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(5)
    return model


def eager_copy(model, dtype=torch.float64):
    """The same weights with eager attention in float64."""
    twin = copy.deepcopy(model).to(dtype)
    twin.config._attn_implementation = "eager"
    return twin


def visible_per_layer(kept_positions, length, layers, row):
    """Boolean (L, length): which prompt tokens of ``row`` other tokens may see in each layer."""
    visible = torch.ones(layers, length, dtype=torch.bool)
    for stage, positions in sorted(kept_positions.items()):
        kept = positions[row][positions[row] >= 0]
        visible[stage:] = False
        visible[stage:, kept] = True
    return visible


def masked_logits(twin, tokens, visible):
    """Logits (T, V) of one row of ``tokens`` (T,), where layer l sees prompt token j only if ``visible[l, j]``.

    Tokens after the prompt (columns beyond ``visible``) are seen by all later ones.
    """
    architecture = describe(twin)
    total, prompt = tokens.shape[0], visible.shape[1]
    order = torch.arange(total)
    handles = []
    for index, layer in enumerate(architecture.layers):
        seen = torch.cat([visible[index], torch.ones(total - prompt, dtype=torch.bool)])
        allowed = (order[None, :] <= order[:, None]) & (seen[None, :] | (order[None, :] == order[:, None]))
        window = architecture.sliding_window(index)
        if window is not None:
            allowed &= order[:, None] - order[None, :] < window
        mask = torch.zeros(1, 1, total, total, dtype=twin.dtype).masked_fill(~allowed, torch.finfo(twin.dtype).min)
        names = list(inspect.signature(type(layer).forward).parameters)[1:]

        def hook(_module, args, kwargs, mask=mask, names=names):
            arguments = {**dict(zip(names, args, strict=False)), **kwargs, "attention_mask": mask}
            return (arguments.pop("hidden_states"),), arguments

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            return twin(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def assert_logits_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Equal to ``tolerance`` of the largest logit: a float32 norm's rounding, so the error, grows with that scale."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
