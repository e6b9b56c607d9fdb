"""The check on the model itself: what it lets pass, what it refuses, that it leaves no trace; and its reference."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

import sdtp_lib.pruning.masked_reference as masked_reference
import sdtp_lib.pruning.verify as verify
from sdtp_lib import PruningNotSupported
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.masked_reference import hidden_keys, masked_forward
from sdtp_lib.pruning.verify import check_on_entry, trusted, verify_pruning
from tests.pruning.model_state import hooks_of
from tests.reference import eager_copy, louder, masked_logits, visible_per_layer

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class LeakyForCausalLM(LlamaForCausalLM):
    """As a remote-code family might be: each layer also adds the mean of all tokens that came before it."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_hook(self._leak)

    @staticmethod
    def _leak(_layer, _args, output):
        places = torch.arange(1, output.shape[1] + 1, device=output.device)[None, :, None]
        return output + (output.cumsum(1) / places).to(output.dtype)


def leaky(tiny_model, dtype=torch.float32):
    model = LeakyForCausalLM(tiny_model().config).to(dtype).eval().requires_grad_(False)
    return louder(model)


def calls_of(model) -> list[int]:
    """A list that grows by one entry, the number of tokens, with every forward of ``model``."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ("sdpa", "eager"))
@pytest.mark.parametrize("family", ("llama", "qwen3", "gpt_neox", "qwen2_moe"))
def test_a_family_that_is_pruned_exactly_passes_in_every_dtype(tiny_model, family, backend, dtype):
    if family == "qwen2_moe" and dtype == torch.float64:
        pytest.skip("grouped expert kernels know no float64")
    found = verify_pruning(louder(tiny_model(family, dtype=dtype, attn_implementation=backend)), token_pruning)
    assert found.holds
    assert 3 * max(found.prefill_difference, found.decode_difference) < found.tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_mix_tokens_outside_attention_are_refused_with_both_figures(tiny_model, dtype):
    model = leaky(tiny_model, dtype)
    with pytest.raises(PruningNotSupported, match=r"difference [\d.e+-]+ in prefill.*explains [\d.e+-]+") as refusal:
        check_on_entry(model, token_pruning, "llama", "sdpa", "auto")
    assert "LeakyForCausalLM" in str(refusal.value) and "verify='never'" in str(refusal.value)


def test_layers_that_number_the_tokens_themselves_are_refused(tiny_model):
    model = louder(tiny_model())

    def numbered(_layer, _args, output):
        return output * (1 + torch.arange(output.shape[1])[None, :, None] / 64)

    for layer in model.model.layers:
        layer.register_forward_hook(numbered)
    with pytest.raises(PruningNotSupported, match="largest logit difference"):
        verify_pruning(model, token_pruning)


def test_an_error_inside_the_check_becomes_a_refusal(tiny_model):
    model = tiny_model()

    def fail(*_):
        raise TypeError("unheard-of argument")

    model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(PruningNotSupported, match="TypeError: unheard-of argument"):
        verify_pruning(model, token_pruning)


def test_each_model_object_is_asked_once_for_a_backend_and_dtype(tiny_model):
    model = tiny_model()
    seen = calls_of(model)
    first = check_on_entry(model, token_pruning, "llama", "sdpa", "always")
    asked = len(seen)
    assert asked > 0
    assert check_on_entry(model, token_pruning, "llama", "sdpa", "always") is first
    assert len(seen) == asked
    model.to(torch.bfloat16)
    check_on_entry(model, token_pruning, "llama", "sdpa", "always")
    assert len(seen) == 2 * asked


def test_a_refusal_is_remembered_too(tiny_model):
    model = leaky(tiny_model)
    messages = []
    seen = calls_of(model)
    for _ in range(2):
        with pytest.raises(PruningNotSupported) as refusal:
            check_on_entry(model, token_pruning, "llama", "sdpa")
        messages.append((str(refusal.value), len(seen)))
    assert messages[0] == messages[1]


def test_the_prompt_is_short(tiny_model):
    model = tiny_model()
    seen = calls_of(model)
    verify_pruning(model, token_pruning)
    assert 24 <= max(seen) <= 32 and len(seen) <= 6


def test_the_model_and_the_random_state_are_left_as_they_were(tiny_model):
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    training = [m.training for m in model.modules()]
    weights, hooks, state = [p.clone() for p in model.parameters()], hooks_of(model), torch.random.get_rng_state()
    verify_pruning(model, token_pruning)
    assert [m.training for m in model.modules()] == training
    assert hooks_of(model) == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), weights))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", ("Auto", True, None, ""))
def test_an_unknown_mode_is_named(tiny_model, mode):
    with pytest.raises(ValueError, match="verify=.*auto, always, never"):
        check_on_entry(tiny_model(), token_pruning, "llama", "sdpa", mode)


def test_never_asks_nothing(tiny_model):
    model = leaky(tiny_model)
    seen = calls_of(model)
    assert check_on_entry(model, token_pruning, "llama", "sdpa", "never") is None
    assert seen == []


def test_only_transformers_own_classes_on_listed_backends_and_versions_are_trusted(tiny_model, monkeypatch):
    model = tiny_model()
    minor = ".".join(transformers.__version__.split(".")[:2])
    monkeypatch.setattr(verify, "supported", lambda: {minor: {"llama LlamaForCausalLM": ["sdpa"]}})
    assert trusted(model, "llama", "sdpa")
    assert not trusted(model, "llama", "eager")
    assert not trusted(model, "mistral", "sdpa")
    assert not trusted(leaky(tiny_model), "llama", "sdpa")
    seen = calls_of(model)
    assert check_on_entry(model, token_pruning, "llama", "sdpa", "auto") is None and seen == []
    assert check_on_entry(model, token_pruning, "llama", "sdpa", "always").holds and seen
    monkeypatch.setattr(verify, "supported", lambda: {"4.0": {"llama LlamaForCausalLM": ["sdpa"]}})
    assert not trusted(model, "llama", "sdpa")


def test_the_list_that_ships_names_the_version_that_it_was_made_with():
    works = verify.supported()
    assert works and all(len(version.split(".")) == 2 for version in works)
    assert "sdpa" in works["5.23"]["llama LlamaForCausalLM"]
    json.dumps(works)


# --- the reference


@pytest.mark.parametrize("module", (masked_reference,), ids=lambda m: m.__name__)
def test_the_reference_shares_no_code_with_what_it_checks(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name and name.startswith("sdtp_lib")]


@pytest.mark.parametrize("family", ("llama", "mistral", "gemma2", "gpt2", "bloom"))
def test_two_references_written_apart_agree(tiny_model, family):
    extras = {"sliding_window": 12} if family in ("mistral", "gemma2") else {}
    extras |= {"query_pre_attn_scalar": 8} if family == "gemma2" else {}
    sizes = {"n_positions": 512, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 64} if family == "gpt2" else {}
    model = louder(tiny_model(family, dtype=torch.float64, attn_implementation="eager", **extras, **sizes))
    tokens = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(0))
    kept = {1: torch.arange(0, 32, 2), 4: torch.tensor([0, 4, 8, 30])}
    found = masked_forward(model, tokens, kept, 32).logits[0]
    visible = visible_per_layer({stage: positions[None] for stage, positions in kept.items()}, 32, 6, 0)
    expected = masked_logits(eager_copy(model), tokens[0], visible)
    seen = [*kept[4].tolist(), *range(32, 40)]
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-6)


HIDE = torch.tensor([False, True, False, False])
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
WINDOW = CAUSAL & ~torch.ones(4, 4, dtype=torch.bool).tril(-3)
SEEN = CAUSAL & (~HIDE[None] | torch.eye(4, dtype=torch.bool))
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        (None, SEEN),
        (CAUSAL[None, None], SEEN),
        (WINDOW[None, None], SEEN & WINDOW),
        (~CAUSAL[None, None], SEEN),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), ~HIDE[None] | torch.eye(4, dtype=torch.bool)),
        (torch.zeros(1, 2, 4, 4).masked_fill(~CAUSAL, LOWEST), SEEN),
        (torch.zeros(1, 1, 1, 4), ~HIDE[None] | torch.eye(4, dtype=torch.bool)),
        (CAUSAL.long(), SEEN),
        (CAUSAL[None], SEEN),
    ],
    ids=("none", "bool", "window", "inverted", "all-visible", "added", "one-line", "ones", "no-head-axis"),
)
def test_hidden_keys_leave_a_mask_of_any_form_as_it_was_but_for_the_hidden(mask, visible):
    found = hidden_keys(mask, HIDE, torch.float32)
    if mask is None or mask.is_floating_point():
        got = found > LOWEST / 2
    else:
        assert found.dtype == mask.dtype
        got = (found if bool(found.flatten()[0]) else 1 - found.long()).bool()
    assert all(torch.equal(line.expand(4, 4), visible) for line in got.reshape(-1, *got.shape[-2:]))


def test_a_bias_inside_the_mask_survives():
    alibi = torch.arange(4.0).expand(1, 2, 4, 4).masked_fill(~CAUSAL, LOWEST)
    found = hidden_keys(alibi, HIDE, torch.float32)
    assert torch.equal(found[0, 0][SEEN], alibi[0, 0][SEEN])


@pytest.mark.parametrize("backend", ("flex_attention", "flash_attention_2"))
def test_backends_without_a_mask_of_numbers_are_computed_by_sdpa_meanwhile(tiny_model, backend):
    model = louder(tiny_model(dtype=torch.float64, attn_implementation="sdpa"))
    tokens = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(0))
    kept = {2: torch.tensor([0, 3, 9])}
    expected = masked_forward(model, tokens, kept, 12).logits
    model.config._attn_implementation = backend  # as if loaded so: the kernels are not installed here
    assert torch.equal(masked_forward(model, tokens, kept, 12).logits, expected)
    assert model.config._attn_implementation == backend


def test_layers_are_found_by_number_and_weight():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.LlamaConfig(num_hidden_layers=2)
            self.small = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.large = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])

    model = Two()
    assert masked_reference.find_layers(model) is model.large
