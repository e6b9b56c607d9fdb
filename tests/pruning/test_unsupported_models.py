"""Models that pruning cannot serve are refused on entry by what they are; their kin without that are served."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures import decoder_layers, describe
from tests.reference import assert_logits_equal, eager_copy, louder, masked_logits, visible_per_layer

CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.arange(3, 67)[None]
SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FULL = ["full_attention"]


def on_meta(family, **fields):
    """A model of ``family`` without weights, of the sizes that its configuration has by default but for ``fields``."""
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {family}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()


STATE = r"keeps a state of all tokens.*use a model whose layers all have full or sliding attention"
INDEX = r"index.*use a model whose layers all have full or sliding attention"


@pytest.mark.parametrize(
    ("family", "fields", "match"),
    [
        ("mamba", {"num_hidden_layers": 2}, STATE),
        ("rwkv", {"num_hidden_layers": 2}, STATE),
        ("zamba", {}, rf"{STATE}|no list of 76 decoder layers.*Adding a family"),
        ("glm_moe_dsa", {}, INDEX),
        ("deepseek_v32", {}, INDEX),
        ("deepseek_v4", {}, INDEX),
        ("minimax_m3_vl_text", {"layer_types": [*FULL * 59, "minimax_m3_sparse"]}, f"decoder layer 59.*{INDEX}"),
        ("gemma3n_text", {}, r"keeps no keys of its own|takes the unknown argument\(s\)|several streams"),
        ("bert", {}, r"BertLMHeadModel is built as an encoder \(is_decoder=False\).*trained as a decoder"),
        ("rembert", {}, r"is built as an encoder \(is_decoder=False\).*trained as a decoder"),
        ("dory", {}, r"runs its layers more than once per forward \(n_recurrent_loops=2\).*each layer once"),
        ("git", {}, "multimodal.*give a language model"),
        ("xlnet", {}, "no list of 24 decoder layers.*Adding a family"),
        ("mpt", {}, "decoder layer 0 .*position_bias.*Adding a family"),
    ],
)
def test_a_kind_that_cannot_be_served_is_refused_by_what_its_layers_are(family, fields, match):
    with pytest.raises(PruningNotSupported, match=match):
        describe(on_meta(family, **fields))


@pytest.mark.parametrize(
    ("family", "fields", "layers"),
    [
        ("lfm2", {"layer_types": FULL * 6, "num_hidden_layers": 6}, 6),
        ("jamba", {"num_hidden_layers": 4, "attn_layer_period": 1, "attn_layer_offset": 0}, 4),
        ("qwen3_next", {"layer_types": FULL * 6, "num_hidden_layers": 6}, 6),
        ("minimax", {"layer_types": FULL * 6, "num_hidden_layers": 6}, 6),
        ("llama4_text", {"layer_types": FULL * 4, "num_hidden_layers": 4}, 4),
        ("bert", {"is_decoder": True}, 12),
        ("gpt_neox_japanese", {}, 32),  # says is_decoder=False and is one all the same
        ("mbart", {"encoder_layers": 6, "decoder_layers": 4}, 4),
    ],
)
def test_the_same_family_without_such_layers_is_served(family, fields, layers):
    assert len(describe(on_meta(family, **fields)).layers) == layers


@pytest.mark.parametrize("kinds", (["global", "local"], ["global", "global"]))
def test_a_window_that_a_layer_keeps_in_a_table_of_its_own_is_refused_and_a_causal_table_is_not(tiny_model, kinds):
    """GPT-Neo's local layers once counted their window in kept tokens: logits were off by four tenths, silently."""
    sizes = {"hidden_size": 32, "num_layers": 6, "num_heads": 4, "window_size": 16, "max_position_embeddings": 128}
    model = tiny_model("gpt_neo", attn_implementation="eager", attention_types=[[kinds, 3]], **sizes)
    if "local" in kinds:
        with pytest.raises(PruningNotSupported, match=r"layer 1 \(GPTNeoBlock\) holds a window of its own.*bias"):
            describe(model)
    else:
        with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency(), verify="always") as trace:
            model(input_ids=PROMPT)
        assert trace.prefills == 1


@pytest.mark.parametrize("family", ["bert", "electra", "bert-generation", "megatron-bert"])
def test_a_bert_that_is_a_decoder_is_pruned_as_if_the_dropped_keys_were_masked(tiny_model, family):
    """It once ran whole, silently: its layers lie in a module that gets hidden states, the engine waits for tokens."""
    model = louder(tiny_model(family, is_decoder=True, dtype=torch.float64))
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()) as trace:
        found = model(input_ids=PROMPT).logits[0]
        ids = model.generate(PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[0]
    assert trace.tokens_per_layer == [64, 38, 38, 22, 22, 22]
    visible = visible_per_layer(trace.kept_positions, 64, 6, 0)
    expected = masked_logits(eager_copy(model), ids[:-1], visible)
    assert_logits_equal(found, expected[trace.kept_positions[3][0]])
    assert ids[64:].tolist() == expected[63:].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (LlamaForCausalLM, r"LlamaForCausalLM is a class.*LlamaForCausalLM\.from_pretrained"),
        ("org/model", r"'org/model' is a name.*load_model\('org/model'\)"),
        (Path("models/mine"), r"'models/mine' is a name.*load_model\('models/mine'\)"),
        ((nn.Linear(2, 2), None), "model is a tuple.*model, tokenizer = load_model"),
        (SimpleNamespace(model=nn.Linear(2, 2)), r"a pipeline: give the model inside, pipeline\.model"),
        (None, "model is a NoneType: give a causal LM"),
        (nn.Linear(2, 2), "Linear has no transformers configuration: give a causal LM"),
    ],
    ids=["a class", "a name", "a path", "a pair", "a pipeline", "nothing", "a module of torch"],
)
def test_what_is_no_model_gets_a_sentence_with_the_remedy(model, match):
    with pytest.raises(PruningNotSupported, match=match), token_pruning(model, CONFIG, scorers.recency()):
        pass


def test_a_real_pipeline_is_refused_and_the_model_inside_it_is_served(tiny_model, tiny_tokenizer):
    from transformers import pipeline

    made = pipeline("text-generation", model=tiny_model(), tokenizer=tiny_tokenizer, device="cpu")
    with pytest.raises(PruningNotSupported, match=r"TextGenerationPipeline, a pipeline: .*pipeline\.model"):
        describe(made)
    with token_pruning(made.model, CONFIG, scorers.recency()) as trace:
        made("a prompt of some length, " * 4, max_new_tokens=2)
    assert trace.prefills == 1
    assert trace.tokens_per_layer[-1] < trace.tokens_per_layer[0]


def test_a_parallel_wrapper_is_refused_with_the_model_inside(tiny_model):
    with pytest.raises(PruningNotSupported, match=r"DataParallel has no .*DataParallel\.module"):
        describe(nn.DataParallel(tiny_model()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks, newer transformers warns
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_of_peft_are_refused_and_the_model_below_them_is_served(tiny_model, kind):
    peft = pytest.importorskip("peft")
    adapter = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(tiny_model(), adapter).eval()
    with pytest.raises(PruningNotSupported, match=r"'default' is of PEFT's kind P.*_TUNING.*LoRA.*get_base_model\(\)"):
        describe(model)
    with torch.no_grad(), token_pruning(model.get_base_model(), CONFIG, scorers.recency()) as trace:
        model.get_base_model()(input_ids=PROMPT)
    assert trace.tokens_per_layer[-1] == 22


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_is_served(tiny_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM")).eval()
    assert len(decoder_layers(model)) == 6
