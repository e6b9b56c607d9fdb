"""A bias on keys in every kind of attention against independent computations: logits as they are, gradients as told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from sdtp_lib import PruningNotSupported
from sdtp_lib.architectures import attention_bias as door
from sdtp_lib.architectures.attention_bias import attention_bias, attention_mask_out, bias_route
from sdtp_lib.training.labels import saliency_of

IDS = torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
# All experts for each token: a router that chooses would jump within a finite difference.
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OWN_FIELDS = {
    "afmoe": {**EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1},
    "deepseek_v3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
                    "head_dim": None, **EXPERTS},
    "falcon": {"head_dim": None, "num_key_value_heads": None},
    "flint": EXPERTS,
    "gpt_neo": {"num_layers": 6, "num_heads": 4, "attention_types": [[["global"], 6]], "window_size": 32,
                "num_hidden_layers": None, "num_attention_heads": None},
    "gpt_oss": EXPERTS,
    "gptj": {"n_embd": 32, "n_layer": 6, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    "granitemoe_swa": EXPERTS,
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 512},
    "jetmoe": {**EXPERTS, "kv_channels": 8, "head_dim": None},
    "mimo_v2_flash": {**EXPERTS, "v_head_dim": 8, "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
                      "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
}  # fmt: skip
FAMILIES = (
    # one dimension more on the keys
    ("llama", "sdpa", "keys"), ("llama", "eager", "keys"), ("qwen3", "sdpa", "keys"), ("mistral", "sdpa", "keys"),
    ("ministral3", "sdpa", "keys"), ("olmo3", "sdpa", "keys"), ("gemma3_text", "sdpa", "keys"),
    ("phi3", "sdpa", "keys"), ("gpt2", "eager", "keys"), ("gpt_neox", "sdpa", "keys"), ("deepseek_v3", "sdpa", "keys"),
    ("cohere2", "sdpa", "keys"), ("afmoe", "sdpa", "keys"), ("jetmoe", "eager", "keys"),
    # attention sinks, a soft cap
    ("gpt_oss", "eager", "mask"), ("granite_swa", "eager", "mask"), ("gemma2", "eager", "mask"),
    ("flint", "eager", "mask"), ("mimo_v2_flash", "eager", "mask"), ("granitemoe_swa", "eager", "mask"),
    # attention of their own
    ("bloom", "eager", "mask"), ("falcon", "sdpa", "mask"), ("falcon", "eager", "mask"), ("gptj", "eager", None),
    ("gpt_neox_japanese", "eager", "mask"), ("gpt_neo", "eager", "mask"),
)  # fmt: skip


@pytest.fixture
def model_of():
    """A tiny float64 model whose attention matters; families that a release does not have are skipped."""

    def build(family: str, backend: str = "sdpa"):
        if family not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {family}")
        fields = {name: value for name, value in {**SIZES, **OWN_FIELDS.get(family, {})}.items() if value is not None}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=backend, dtype=torch.float64)
        model.eval().requires_grad_(False)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the fast ones know no float64
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and not any(part in name for part in ("embed", "wte", "wpe")):
                    parameter.mul_(5)
                if name.endswith("sinks"):
                    parameter.fill_(2.0)
        return model

    return build


def loss_of(model, **options):
    logits = model(IDS, use_cache=False, **options).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="sum")


@pytest.mark.parametrize(("family", "backend", "route"), FAMILIES)
def test_a_bias_of_zero_leaves_the_logits_as_they_are(model_of, family, backend, route):
    """gpt-oss ran without its attention sinks, so its default label belonged to another model."""
    model = model_of(family, backend)
    assert bias_route(model) == route or route is None, "None: it depends on the release"
    plain, backend_before = model(IDS, use_cache=False).logits, model.config._attn_implementation
    with attention_bias(model) as leaves:
        torch.testing.assert_close(model(IDS, use_cache=False).logits, plain, rtol=1e-4, atol=1e-5)
    assert set(leaves) == set(range(model.config.num_hidden_layers))
    assert type(model.config._attn_implementation) is str and model.config._attn_implementation == backend_before
    torch.testing.assert_close(model(IDS, use_cache=False).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("family", "backend", "route"), [case for case in FAMILIES if case[0] != "bloom"])
def test_the_gradient_is_the_finite_difference_of_a_bias_in_a_mask_of_the_callers(model_of, family, backend, route):
    """transformers hands a 4-D mask on to all layers: one bias for all, which none of our code has touched."""
    model = model_of(family, backend)
    lowest = torch.finfo(torch.float64).min
    causal = torch.full((16, 16), lowest, dtype=torch.float64).triu(1)[None, None]
    with torch.enable_grad(), attention_bias(model) as leaves:
        gradient = sum(torch.autograd.grad(loss_of(model), list(leaves.values())))[0]
    scale = float(gradient.abs().max())
    assert scale > 1e-3
    for token in (0, 5, 12):
        bias = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
        bias[..., token] = 1e-3
        above, below = (loss_of(model, attention_mask=(causal + sign * bias).clamp_min(lowest)) for sign in (1, -1))
        assert float(above - below) / 2e-3 == pytest.approx(float(gradient[token]), abs=3e-3 * scale)


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "falcon", "gemma2", "llama"])
def test_a_masked_out_token_no_longer_matters_to_those_after_it(model_of, family):
    model = model_of(family, None)
    keep = torch.ones(1, 16, dtype=torch.float64)
    keep[0, 4] = 0
    other = IDS.clone()
    other[0, 4] = (IDS[0, 4] + 1) % 100 + 3
    lowest = door.LOWEST_KEEP
    with attention_mask_out(model, {0: keep}):
        change = (model(other, use_cache=False).logits - model(IDS, use_cache=False).logits)[:, 5:].abs().max()
    plain = (model(other, use_cache=False).logits - model(IDS, use_cache=False).logits)[:, 5:].abs().max()
    assert change < 1e4 * lowest * plain, "a millionth of its weight is left"


@pytest.mark.parametrize("family", ["gpt_oss", "bloom", "gemma2", "falcon"])
def test_heads_of_their_own_biases_add_up_to_the_joint_one(model_of, family):
    model = model_of(family, None)
    found = []
    for by_head in (False, True):
        with torch.enable_grad(), attention_bias(model, (2,), per_kv_head=by_head) as leaves:
            found.append(torch.autograd.grad(loss_of(model), leaves[2])[0])
    assert found[1].dim() == 3
    torch.testing.assert_close(found[1].sum(1), found[0], rtol=1e-6, atol=1e-9)


def test_a_model_on_which_no_way_proves_right_is_refused_by_name_before_any_label(model_of, monkeypatch):
    """CodeGen (transformers 5.23) adds its mask before it scales the scores: a bias is another one than it says."""

    def scaled(architecture, bias_of):
        def halved(index, key):
            bias = bias_of(index, key)
            return None if bias is None else bias / 2

        return door._through_mask(architecture, halved)

    monkeypatch.setattr(door, "_ROUTES", {"mask": scaled})
    model, ones = model_of("llama", "eager"), torch.ones_like(IDS)
    with pytest.raises(PruningNotSupported, match=r"llama: .* could not be verified.*odds by exp.*label="):
        saliency_of(model, IDS, ones, ones, [1], "removal")
    assert saliency_of(model, IDS, ones, ones, [1], "gradient_x_hidden")[1].max() > 0


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_sdpa_never_stands_in_for_attention_with_sinks_or_a_soft_cap(model_of, family, monkeypatch):
    monkeypatch.setattr(door, "_ROUTES", {"keys": door._through_keys})
    with pytest.raises(PruningNotSupported, match="sdpa leaves out what this attention is given"):
        bias_route(model_of(family, "eager"))


def test_the_probe_catches_a_way_that_changes_the_logits_by_itself(model_of, monkeypatch):
    def slanted(architecture, bias_of):
        return door._through_keys(architecture, lambda index, key: bias_of(index, key) + torch.arange(key.shape[2]) / 9)

    monkeypatch.setattr(door, "_ROUTES", {"keys": slanted})
    with pytest.raises(PruningNotSupported, match="a bias of 0 changes the logits"):
        bias_route(model_of("llama", "eager"))


def test_a_layer_that_runs_twice_is_refused_since_one_bias_cannot_stand_for_both(model_of):
    """As looped models do (Dory): labels once were those of the last run alone, silently."""
    model = model_of("llama", "sdpa")
    layer, inside = model.model.layers[2], []

    def again(module, args, kwargs, output):
        if inside:
            return output
        inside.append(True)
        output = module(output, *args[1:], **kwargs)
        inside.clear()
        return output

    handle = layer.register_forward_hook(again, with_kwargs=True)
    try:
        with pytest.raises(PruningNotSupported, match="layer 2 runs more than once per forward"):
            bias_route(model)
    finally:
        handle.remove()


def test_a_model_is_tried_once_for_each_backend(model_of, monkeypatch):
    model, tried = model_of("llama"), []
    inner = door.first_that_proves_right
    monkeypatch.setattr(door, "first_that_proves_right", lambda *given: tried.append(1) or inner(*given))
    for backend in ("sdpa", "sdpa", "eager"):
        model.set_attn_implementation(backend)
        bias_route(model)
    assert len(tried) == 2


def test_an_attention_that_goes_by_the_backends_name_does_not_notice_ours(model_of):
    """Sparse attention makes its mask for the names "eager" and "sdpa" only, and lost it under a name of ours."""
    model, names = model_of("llama"), []
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda module, _: names.append(module.config._attn_implementation in ("sdpa",)))
    with attention_bias(model):
        model(IDS, use_cache=False)
    assert names and all(names)
