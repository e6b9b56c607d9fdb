"""A model's own weights counted, against torch's counter: every family is counted or refused by name."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdtp_lib import budget
from sdtp_lib.model_shape import MODEL_FIELDS, ModelShape

TOKENS = 40
_TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": None}  # fmt: skip
_MOE = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24}  # fmt: skip
_DENSE_FIRST = {**_MOE, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_MLA = {"head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 6}  # fmt: skip
_WINDOW = {"sliding_window": 16}
# Family -> fields beyond the tiny ones; None leaves one out.
FAMILIES = {
    "llama": {"head_dim": 24},
    "mistral": _WINDOW,
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3_text": {**_WINDOW, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "cohere2": _WINDOW,
    "olmo2": {},
    "glm4": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "arcee": {},
    "apertus": {},
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]]},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 4, "n_ctx": 512},
    "falcon": {"head_dim": None},
    "bloom": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 6},
    "mixtral": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 2},
    "olmoe": _MOE,
    "phimoe": _MOE,
    "granitemoe": _MOE,
    "jetmoe": {**_MOE, "kv_channels": 8, "num_attention_heads": None, "head_dim": None},
    "gpt_oss": {**_MOE, **_WINDOW},
    "ernie4_5_moe": {**_MOE, "moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1},
    "glm4_moe": _DENSE_FIRST,
    "dots1": _DENSE_FIRST,
    "deepseek_v2": {**_DENSE_FIRST, **_MLA},
    "deepseek_v3": {**_DENSE_FIRST, **_MLA},
    "minicpm3": _MLA,
}


def _known(family):
    import transformers

    try:
        transformers.AutoConfig.for_model(family)
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    return transformers.AutoConfig


def _config(family):
    fields = {**_TINY, **FAMILIES[family]}
    return _known(family).for_model(family, **{name: value for name, value in fields.items() if value is not None})


@pytest.fixture(scope="module")
def build():
    made = {}

    def cached(family):
        if family not in made:
            from transformers import AutoModelForCausalLM

            made[family] = model = AutoModelForCausalLM.from_config(_config(family), attn_implementation="eager").eval()
            if "num_experts" in FAMILIES[family] and hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # the loop over experts, which torch's counter sees
        return made[family]

    return cached


def prompt():
    return torch.arange(3, 3 + TOKENS)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_flops_and_weights_are_those_of_the_model(family, build):
    model = build(family)
    shape = ModelShape.from_model(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(prompt(), use_cache=False)
    expected = budget.prefill_flops(shape, [TOKENS] * 6, causal=False, logits_positions=TOKENS)
    # Releases before 5.23 make rotary angles by a matrix product too, 2 T d / 2 FLOPs per call.
    assert expected == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_bytes_are_those_of_the_model(family, build):
    model = build(family)
    shape = ModelShape.from_model(model)
    with torch.no_grad():
        # The cache's name among arguments and outputs changed in transformers 5.24.
        name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        past = model(prompt(), use_cache=True)[name]
        held = sum(tensor.nbytes for layer in past.layers for tensor in (layer.keys, layer.values))
    assert budget.kv_bytes(shape, [TOKENS] * 6, 4) == held


@pytest.mark.parametrize("family", ["llama", "gptj", "qwen2_moe", "deepseek_v3", "gemma3_text"])
def test_a_configuration_alone_gives_the_models_shape_and_is_left_as_it_was(family, build):
    config = build(family).config
    before, state = config.to_dict(), torch.get_rng_state()
    assert ModelShape.from_config(config) == ModelShape.from_model(build(family))
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_may_differ_dense_first_and_windows_between():
    shape = ModelShape.from_config({"model_type": "qwen3_moe", **_sizes(), **_MOE, "decoder_sparse_step": 2})
    dense, sparse = shape.layers[0], shape.layers[1]
    assert sparse.matmul_weights == dense.matmul_weights - 3 * 32 * 48 + 2 * 3 * 32 * 24 + 8 * 32
    assert sparse.idle_weights == 6 * 3 * 32 * 24 and dense.idle_weights == 0
    assert shape.read_share == 1 - 2 * sparse.idle_weights / shape.parameters
    gemma = ModelShape.from_config({"model_type": "gemma2", **_sizes(), **_WINDOW})
    assert [layer.window for layer in gemma.layers] == [16, None, 16, None]


def _sizes():
    return {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_lora_adapter_is_counted_with_the_model_that_carries_it(tiny_model):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    plain = ModelShape.from_model(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert ModelShape.from_model(adapted).active_weights == plain.active_weights + 6 * 4 * (32 + 32)


def test_what_stands_beside_the_text_layers_of_a_multimodal_model_is_not_counted(tiny_model):
    """Fuyu keeps its image projection in the module that ``get_decoder`` names: 111 % too many FLOPs of a text."""
    text = tiny_model("llama")

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_embed_tokens, self.language_model = torch.nn.Linear(900, 32), text.model

    class Multimodal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(get_text_config=lambda: text.config)
            self.model, self.lm_head = Decoder(), text.lm_head
            self.get_decoder, self.get_output_embeddings = lambda: self.model, lambda: self.lm_head
            self.get_input_embeddings = text.get_input_embeddings

    tokens = [TOKENS] * 6
    assert budget.prefill_flops(ModelShape.from_model(Multimodal()), tokens) == budget.prefill_flops(
        ModelShape.from_model(text), tokens
    )


def test_a_packed_weight_counts_as_what_it_stands_for(tiny_model):
    model = tiny_model("llama")
    plain = ModelShape.from_model(model)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8), False)
    assert ModelShape.from_model(model) == plain


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("llama4_text", "chunked_attention"),
        ("deepseek_v32", "(indexed_attention|indexer)"),
        ("diffllama", "lambda_q1"),
        ("doge", "table"),
        ("gemma3n_text", "altup"),
        ("dory", "more than once per forward"),
    ],
)
def test_what_is_no_softmax_attention_and_matrix_product_is_refused_by_name(family, named):
    fields = {**_sizes(), **_MOE, **({"is_moe": True, "num_experts": 16} if family == "doge" else {})}
    if family == "deepseek_v32":
        fields |= {**_DENSE_FIRST, **_MLA}
    if family == "llama4_text":
        fields |= {"intermediate_size_mlp": 48}
    if family == "gemma3n_text":
        fields |= {"num_kv_shared_layers": 0, "activation_sparsity_pattern": None}
    fields = {name: value for name, value in fields.items() if value is not None}
    _known(family)
    with pytest.raises(ValueError, match=rf"{family} layer \d.*{named}.*not known here"):
        ModelShape.from_config({"model_type": family, **fields})


def test_a_model_without_attention_is_refused_by_name():
    _known("mamba")
    with pytest.raises(ValueError, match=r"(no attention|attention modules)"):
        ModelShape.from_config({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 128})


def test_a_state_costs_what_a_token_adds_to_it_and_reads_out_of_it():
    """The delta rule asks the state three times a token, Mamba twice; a hybrid's other layers have heads and keys."""
    _known("qwen3_next")
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = ["linear_attention", "full_attention"] * 2
    fields = {**_sizes(), "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    shape = ModelShape.from_config({"model_type": "qwen3_next", "layer_types": kinds, **fields, **linear})
    state, attention = shape.layers[:2]
    assert (state.state_flops, state.cache_width, state.flops_per_pair) == (4 * 8 * 8 * 6, 0, 0)
    assert (attention.state_flops, attention.num_heads) == (0, 4)
    full, half = (budget.prefill_flops(shape, [tokens] * 4) for tokens in (64, 32))
    pairs = 2 * attention.flops_per_pair * (64 * 64 - 2 * 32 * 32) / 2
    assert full - 2 * half == pytest.approx(pairs - 2 * shape.head_weights), "states are linear in the tokens"
    _known("granitemoehybrid")
    fields = {**_sizes(), "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8}
    mamba = ModelShape.from_config({"model_type": "granitemoehybrid", **fields, "mamba_d_state": 16}).layers[0]
    assert mamba.state_flops == 8 * 8 * 16 * 4


def test_a_layer_that_attends_to_images_is_refused_by_name():
    """A text leaves Mllama's cross-attention layers out; they were once counted: 19 % too many FLOPs."""
    import transformers

    if not hasattr(transformers, "MllamaTextConfig"):
        pytest.skip(f"transformers {transformers.__version__} shows no MllamaTextConfig")
    from transformers import MllamaForCausalLM, MllamaTextConfig

    fields = {name: value for name, value in _sizes().items() if value is not None}
    with torch.device("meta"):
        model = MllamaForCausalLM(MllamaTextConfig(**fields, cross_attention_layers=[1], pad_token_id=0))
    with pytest.raises(ValueError, match=r"layer 1 \(MllamaCrossAttentionDecoderLayer\) attends to something else"):
        ModelShape.from_model(model)


def test_what_transformers_cannot_build_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"vit.*give the model to ModelShape.from_model"):
        ModelShape.from_config({"model_type": "vit"})
    with pytest.raises(ValueError, match=r"model_type='nope'.*give the model to ModelShape.from_model"):
        ModelShape.from_config({"model_type": "nope"})
    with pytest.raises(ValueError, match="no model_type"):
        ModelShape.from_config({"hidden_size": 8})


@pytest.mark.parametrize("name", MODEL_FIELDS)
def test_the_named_models_sizes_give_what_their_configuration_gives(name):
    fields = dict(MODEL_FIELDS[name])
    kind = fields.pop("model_type")
    renamed = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "tied_embeddings":
               "tie_word_embeddings", "num_kv_heads": "num_key_value_heads"}  # fmt: skip
    config = {renamed.get(field, field): value for field, value in fields.items()}
    config = {field: value for field, value in config.items() if field not in ("gated_mlp", "attention_bias")}
    config |= {"tie_word_embeddings": fields.get("tied_embeddings", False), "sliding_window": None}
    if kind == "bloom":
        config |= {"n_layer": config.pop("num_hidden_layers"), "n_head": config.pop("num_attention_heads")}
        del config["head_dim"]
    counted, named = ModelShape.from_config({"model_type": kind, **config}), ModelShape.named(name)
    assert counted.active_weights == named.active_weights
    assert counted.parameters == pytest.approx(named.parameters, rel=1e-3)
    for field in ("query_width", "cache_width", "flops_per_pair", "window"):
        assert getattr(counted.layers[-1], field) == getattr(named.layers[-1], field)


def test_published_sizes_of_mixtures_are_met():
    sizes = {"gpt_oss": (116.8, 5.1), "deepseek_v3": (671.0, 36.6), "mixtral": (46.7, 12.7)}
    for kind, (held, active) in sizes.items():
        shape = ModelShape.from_config({"model_type": kind})
        assert shape.parameters / 1e9 == pytest.approx(held, abs=0.05)
        assert shape.active_weights / 1e9 == pytest.approx(active, abs=0.06)


def test_a_model_of_a_folder_is_known_by_its_configuration(tmp_path, tiny_model):
    model = tiny_model("starcoder2")
    model.config.save_pretrained(tmp_path)
    assert ModelShape.of(str(tmp_path)) == ModelShape.from_model(model)
    assert ModelShape.of("Llama-2-7B") == ModelShape.named("Llama-2-7B")
    with pytest.raises(ValueError, match="neither one of SmolLM2"):
        ModelShape.of(str(tmp_path / "nothing"))


def test_a_named_model_needs_no_torch():
    code = (
        "import sys; from sdtp_lib.model_shape import ModelShape; ModelShape.named('Llama-2-7B'); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
