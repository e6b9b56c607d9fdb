"""The checks of a family's labels: each label against an explicit bias in the mask of every layer.

The gradient of the loss at that bias is what a removal label claims to be; `gradient_x_hidden` is held against a scale
on a layer's input and `attention_entropy` against ``output_attentions``. None of it is code that is under test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from family_subject import CONFIG, PROMPT, RESPONSE, Subject, attentions_of, equal, line_of
from torch import nn

from sdtp_lib import compute_saliency
from sdtp_lib.pruning.masked_reference import NoReference, changed_masks, find_layers, hidden_keys, is_added

LABEL_NAMES = ("gradient_x_hidden", "removal", "removal_by_head", "removal_joint", "removal_odds", "attention_entropy")
LABEL_TOLERANCE = 1e-4  # of the largest label: labels are float32


def label_check(name: str) -> Callable[[Subject], float | None]:
    """The check of one label, on one sample of a prompt and eight response tokens."""

    def check(subject: Subject) -> float | None:
        stages, prompt = list(CONFIG.layers), PROMPT - RESPONSE
        ids = subject.tokens[0].tolist()
        sample = {"id": "0", "prompt_ids": ids[:prompt], "response_ids": ids[prompt:]}
        with tempfile.TemporaryDirectory() as folder:
            row = compute_saliency(subject.model, [sample], stages, name, cache_dir=folder, progress=False)[0]
        found = {stage: torch.tensor(row[f"layer_{stage}"])[:prompt] for stage in stages}
        _ = subject.reference_holds
        expected = _expected_label(subject, name, stages)
        worst = 0.0
        for stage in stages:
            # In units of the largest: whether a loss is summed or averaged is not the point here.
            said, true = found[stage].double(), expected[stage][:prompt].double()
            said, true = said / said.max().clamp_min(1e-30), true / true.max().clamp_min(1e-30)
            worst = max(worst, equal(said, true, f"{name} at layer {stage}", LABEL_TOLERANCE))
        return worst

    check.__doc__ = f"The label {name!r} against an explicit bias in each layer's mask."
    return check


def _expected_label(subject: Subject, name: str, stages: list[int]) -> dict[int, torch.Tensor]:
    model, first = subject.model, PROMPT - RESPONSE
    if name == "attention_entropy":
        output = _eager_attentions(subject)
        share = {stage: -torch.xlogy(a, a).mean(1)[0, first:] for stage, a in enumerate(output)}
        return {stage: share[stage].mean(0) for stage in stages}
    layers, dtype = find_layers(model), next(model.parameters()).dtype
    if name == "gradient_x_hidden":
        scale = {s: torch.zeros(1, PROMPT, 1, dtype=dtype, requires_grad=True) for s in stages}

        def scaled(stage: int):
            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]):
                if args:
                    return (args[0] * (1 + scale[stage]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 + scale[stage])}

            return hook

        handles = [layers[s].register_forward_pre_hook(scaled(s), with_kwargs=True) for s in stages]
        try:
            gradients = torch.autograd.grad(_loss(subject, name), list(scale.values()))
        finally:
            for handle in handles:
                handle.remove()
        return {s: g[0, :, 0].abs() for s, g in zip(stages, gradients, strict=True)}
    groups = [_kv_heads(subject, layer) if name == "removal_by_head" else 1 for layer in layers]
    heads = int(model.config.get_text_config().num_attention_heads)
    bias = [torch.zeros(1, count, 1, PROMPT, dtype=dtype, requires_grad=True) for count in groups]

    def add(index: int, mask: Any, hidden: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(PROMPT, dtype=torch.bool)
        mask = hidden_keys(mask, nothing, hidden.dtype)
        if mask.dim() != 4:
            raise NoReference(f"its masks have {mask.dim()} axes: a bias for each head cannot be put into them")
        if not is_added(mask):
            visible = mask == mask[..., :1, :1]  # a token sees itself
            mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~visible, torch.finfo(hidden.dtype).min)
        return mask + bias[index].repeat_interleave(heads // groups[index] if groups[index] > 1 else 1, dim=1)

    try:
        with changed_masks(model, add):
            loss = _loss(subject, name)
    except NoReference:
        raise
    except RuntimeError as error:  # of shapes: Doge has masks of its own, made for other heads
        raise NoReference(f"a bias for each head in its masks ends in {line_of(error)}") from error
    if not loss.requires_grad:
        raise NoReference("its attention asks a mask only who sees whom: a bias in it changes nothing")
    gradients = [g[0, :, 0] for g in torch.autograd.grad(loss, bias)]
    expected = {}
    for stage in stages:
        below = gradients[stage:]
        if name == "removal_joint":
            expected[stage] = sum(g.sum(0) for g in below).abs()
        else:
            expected[stage] = sum(g.abs().sum(0) for g in below)
    return expected


def _loss(subject: Subject, name: str) -> torch.Tensor:
    tokens, first = subject.tokens, PROMPT - RESPONSE
    with torch.enable_grad():
        output = subject.model(input_ids=tokens, use_cache=False, return_dict=True, **subject.positions(tokens))
        logits = output.logits[0, first - 1 : -1]
        loss = nn.functional.cross_entropy(logits.double(), tokens[0, first:], reduction="none")
        if name != "removal_odds":
            return loss.sum()
        signs = torch.randint(0, 2, (RESPONSE,), generator=torch.Generator().manual_seed(20250404)).mul(2).sub(1)
        return ((-loss - (-torch.expm1(-loss)).clamp(min=1e-4).log()) * signs).sum()


def _eager_attentions(subject: Subject) -> Any:
    config = subject.model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            output = subject.model(
                input_ids=subject.tokens, use_cache=False, output_attentions=True, return_dict=True,
                **subject.positions(subject.tokens),
            )  # fmt: skip
    finally:
        config._attn_implementation = before
    return attentions_of(subject, output)


def _kv_heads(subject: Subject, layer: nn.Module) -> int:
    """Heads of the keys that a layer's attention computes with: a latent cache holds fewer, and layers may differ."""
    heads = int(subject.model.config.get_text_config().num_attention_heads)
    groups = [g for module in layer.modules() if isinstance(g := getattr(module, "num_key_value_groups", None), int)]
    return heads // groups[0] if groups else heads
