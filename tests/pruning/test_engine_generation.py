"""Everything that ``generate`` does, inside ``with token_pruning``: equal to a loop on the pruned cache by hand."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, TextIteratorStreamer

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.reference import assert_logits_equal, eager_copy, masked_logits, visible_per_layer

CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
SCORER = scorers.attention(4)


@pytest.fixture
def model(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(5)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def prompt():
    return torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(5))


def _by_hand(model, prompt, steps):
    """Greedy ids of a prefill and single-token forwards on its cache."""
    with torch.no_grad(), token_pruning(model, CONFIG, SCORER):
        out = model(input_ids=prompt, use_cache=True)
        tokens = []
        for _ in range(steps):
            tokens.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
            out = model(input_ids=tokens[-1], **cache_argument(model, cache_in(out)))
    return torch.cat([prompt, *tokens], dim=1)


def _generate(model, prompt, **arguments):
    arguments = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt), **arguments}
    with token_pruning(model, CONFIG, SCORER) as trace:
        return model.generate(prompt, **arguments), trace


def test_greedy_generation_prefills_once_and_equals_the_loop_by_hand(model, prompt):
    ids, trace = _generate(model, prompt)
    assert torch.equal(ids, _by_hand(model, prompt, 10))
    assert trace.prefills == 1
    assert not torch.equal(ids, model.generate(prompt, max_new_tokens=10, do_sample=False)), "pruning changed nothing"


def test_decode_extends_the_caches_of_the_pruned_prefill(model, prompt):
    output, trace = _generate(model, prompt, return_dict_in_generate=True)
    lengths = [layer.keys.shape[-2] for layer in cache_in(output).layers]
    # The last new token is returned but never run.
    assert lengths == [tokens + 9 for tokens in trace.tokens_per_layer]
    assert trace.tokens_per_layer == [64, 38, 38, 22, 13, 13]
    # keys and values, 2 heads of 8 numbers, 4 bytes each
    assert trace.kv_bytes_per_layer == [2 * tokens * 2 * 8 * 4 for tokens in trace.tokens_per_layer]


def test_sampling_with_a_seed_repeats(model, prompt):
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append(_generate(model, prompt, do_sample=True, top_k=20)[0])
    assert torch.equal(*runs)


def test_beam_search_equals_a_search_that_reruns_the_masked_model(model, prompt):
    model = model.double()
    ids, trace = _generate(model, prompt, num_beams=3, max_new_tokens=5, length_penalty=0.0)
    visible = visible_per_layer(trace.kept_positions, 64, 6, 0)
    twin = eager_copy(model)
    beams = [(0.0, prompt[0])]
    for _ in range(5):
        grown = []
        for score, sequence in beams:
            steps = masked_logits(twin, sequence, visible)[-1].log_softmax(-1)
            best = steps.topk(4)
            grown += [
                (score + value.item(), torch.cat([sequence, token[None]]))
                for value, token in zip(best.values, best.indices, strict=True)
            ]
        beams = sorted(grown, key=lambda beam: beam[0], reverse=True)[:3]
    assert ids[0].tolist() == beams[0][1].tolist()


def test_several_return_sequences_come_from_one_pruned_prefill(model, prompt):
    torch.manual_seed(0)
    ids, trace = _generate(model, prompt, do_sample=True, num_return_sequences=3)
    assert ids.shape == (3, 74)
    assert trace.tokens_per_row.shape == (6, 3)
    assert trace.prefills == 1


def test_one_new_token_equals_the_prefills_argmax(model, prompt):
    ids, _ = _generate(model, prompt, max_new_tokens=1)
    assert torch.equal(ids, _by_hand(model, prompt, 1))


def test_several_generations_in_one_with_are_independent(model, prompt):
    other = prompt.flip(1)
    with token_pruning(model, CONFIG, SCORER) as trace:
        first = model.generate(prompt, max_new_tokens=5, do_sample=False)
        second = model.generate(other, max_new_tokens=5, do_sample=False)
        again = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert trace.prefills == 3
    assert torch.equal(first, again)
    assert torch.equal(second, _by_hand(model, other, 5))


def test_a_second_turn_through_generate_continues_the_returned_cache(model, prompt):
    turn = torch.tensor([[7, 8, 9, 10]])
    with token_pruning(model, CONFIG, SCORER) as trace:
        first = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, turn], dim=1)
        second = model.generate(longer, **cache_argument(model, cache_in(first)), max_new_tokens=4, do_sample=False)
    assert trace.prefills == 1
    visible = visible_per_layer(trace.kept_positions, 64, 6, 0)
    expected = masked_logits(eager_copy(model), second[0], visible).argmax(-1)
    assert second[0, 72:].tolist() == expected[71:-1].tolist()


def test_a_copied_cache_branches_without_disturbing_the_original(model, prompt):
    with torch.no_grad(), token_pruning(model, CONFIG, SCORER):
        cache = cache_in(model(input_ids=prompt, use_cache=True))
        branch = copy.deepcopy(cache)
        step = torch.tensor([[9]])
        first = model(input_ids=step, **cache_argument(model, branch)).logits
        second = model(input_ids=step, **cache_argument(model, cache)).logits
        branch.crop(-1)
        third = model(input_ids=step, **cache_argument(model, branch)).logits
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_streaming_from_a_worker_thread_gives_the_same_text(model, prompt, tiny_tokenizer):
    expected, _ = _generate(model, prompt)
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60)
    with token_pruning(model, CONFIG, SCORER):
        arguments = {"max_new_tokens": 10, "do_sample": False, "streamer": streamer}
        worker = threading.Thread(target=model.generate, args=(prompt,), kwargs=arguments)
        worker.start()
        text = "".join(streamer)
        worker.join()
    assert text == tiny_tokenizer.decode(expected[0, 64:])


def test_stop_strings_end_a_pruned_generation(model, prompt, tiny_tokenizer):
    full, _ = _generate(model, prompt, max_new_tokens=20)
    third = tiny_tokenizer.decode(full[0, 66:67])
    assert third
    ids, _ = _generate(model, prompt, max_new_tokens=20, stop_strings=[third], tokenizer=tiny_tokenizer)
    assert ids.shape[1] <= 67
    assert torch.equal(ids, full[:, : ids.shape[1]])


def test_input_embeddings_serve_as_well_as_ids(model, prompt):
    expected, _ = _generate(model, prompt)
    embeddings = model.get_input_embeddings()(prompt)
    with token_pruning(model, CONFIG, SCORER):
        ids = model.generate(inputs_embeds=embeddings, max_new_tokens=10, do_sample=False)
    assert torch.equal(ids, expected[:, 64:])


def test_a_pipeline_runs_pruned(model, tiny_tokenizer):
    from transformers import pipeline

    text = "the rain in spain stays mainly in the plain and the end of the tale is told again and again"
    generate = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    with token_pruning(model, CONFIG, SCORER) as trace:
        answer = generate(text, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert trace.prefills == 1
    ids = tiny_tokenizer(text, return_tensors="pt").input_ids
    expected = tiny_tokenizer.decode(_by_hand(model, ids, 6)[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for the old name
def test_a_peft_wrapped_model_is_pruned_like_the_model_inside(model, prompt):
    peft = pytest.importorskip("peft")
    expected, _ = _generate(model, prompt)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    with token_pruning(wrapped, CONFIG, SCORER) as trace:
        ids = wrapped.generate(input_ids=prompt, max_new_tokens=10, do_sample=False)
    # A fresh LoRA adds exactly nothing.
    assert torch.equal(ids, expected)
    assert trace.tokens_per_layer[-1] == 13


def test_an_offloaded_cache_gives_the_same_ids(model, prompt):
    if not torch.cuda.is_available():
        pytest.skip("transformers offloads a cache from an accelerator only")
    expected, _ = _generate(model.cuda(), prompt.cuda())
    assert torch.equal(_generate(model, prompt.cuda(), cache_implementation="offloaded")[0], expected)


@pytest.mark.parametrize(("package", "backend", "axes"), [
    ("hqq", "hqq", {"axis_key": 1, "axis_value": 1}),
    # it compiles C++ when first used: more than a minute
    pytest.param("optimum.quanto", "quanto", {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_quantised_cache_is_pruned_and_decodes(model, prompt, package, backend, axes):
    pytest.importorskip(package)
    cache = QuantizedCache(backend, model.config, nbits=4, q_group_size=8, residual_length=16, **axes)
    ids, trace = _generate(model, prompt, **cache_argument(model, cache), max_new_tokens=4)
    assert ids.shape == (1, 68)
    assert [cache.get_seq_length(layer) for layer in range(6)] == [t + 3 for t in trace.tokens_per_layer]


def test_a_cache_of_ones_own_is_used_and_returned(model, prompt):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), token_pruning(model, CONFIG, SCORER):
        out = model(input_ids=prompt, **cache_argument(model, cache), use_cache=True)
    assert cache_in(out) is cache
    assert cache.layers[5].keys.shape[-2] == 13


def test_a_forward_without_a_cache_is_pruned_too(model, prompt):
    with torch.no_grad(), token_pruning(model, CONFIG, SCORER) as trace:
        cached = model(input_ids=prompt, use_cache=True).logits
        plain = model(input_ids=prompt, use_cache=False)
    assert cache_in(plain) is None
    assert torch.equal(plain.logits, cached)
    assert trace.kv_bytes_per_layer == []


def test_output_attentions_under_eager_have_each_layers_own_size(tiny_model, prompt):
    model = tiny_model(attn_implementation="eager")
    with torch.no_grad(), token_pruning(model, CONFIG, SCORER) as trace:
        out = model(input_ids=prompt, use_cache=True, output_attentions=True, output_hidden_states=True)
        step = model(input_ids=prompt[:, :1], **cache_argument(model, cache_in(out)), output_attentions=True)
    assert [a.shape[-1] for a in out.attentions] == trace.tokens_per_layer
    assert [a.shape[-1] for a in step.attentions] == [tokens + 1 for tokens in trace.tokens_per_layer]
    for weights in step.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_compact_positions_equal_a_model_that_sees_renumbered_tokens(model, prompt):
    """One cut: the later layers must see rotary positions 0..K-1, also in decode, and the earlier ones the original."""
    config = PruningConfig(layers=(2,), keep_ratio=0.5, min_local_tokens=4, positions="compact")
    model = model.double()
    with torch.no_grad(), token_pruning(model, config, SCORER) as trace:
        out = model(input_ids=prompt, use_cache=True)
        step = model(input_ids=torch.tensor([[9]]), **cache_argument(model, cache_in(out))).logits[0, 0]
    kept = trace.kept_positions[2][0]
    with torch.no_grad():
        hidden = model.model(input_ids=prompt, output_hidden_states=True).hidden_states[2][:, kept]
        sequence = torch.cat([prompt, torch.tensor([[9]])], dim=1)
        first_layers = _hidden_with_cut(model, sequence, 64)
        late = torch.cat([hidden, first_layers], dim=1)
        tables = model.model.rotary_emb(late, position_ids=torch.arange(late.shape[1])[None])
        for layer in model.model.layers[2:]:
            late = layer(late, attention_mask=None, position_embeddings=tables)
        expected = model.lm_head(model.model.norm(late))[0]
    assert_logits_equal(out.logits[0], expected[:-1])
    assert_logits_equal(step, expected[-1])


def _hidden_with_cut(model, sequence, prompt_tokens):
    """What enters layer 2 for the tokens after the prompt: the first two layers see the whole prompt."""
    return model.model(input_ids=sequence, output_hidden_states=True).hidden_states[2][:, prompt_tokens:]


def test_compact_positions_differ_from_original_ones(model, prompt):
    original, _ = _generate(model, prompt)
    with token_pruning(model, CONFIG.replace(positions="compact"), SCORER):
        compact = model.generate(prompt, max_new_tokens=10, do_sample=False)
    assert not torch.equal(original, compact)


def test_crop_takes_back_tokens_added_after_prefill_and_no_more(model, prompt):
    with torch.no_grad(), token_pruning(model, CONFIG, SCORER):
        cache = cache_in(model(input_ids=prompt, use_cache=True))
        model(input_ids=torch.tensor([[5, 6, 7]]), **cache_argument(model, cache))
        cache.crop(-2)
        assert cache.get_seq_length() == 65
        once = model(input_ids=torch.tensor([[8]]), **cache_argument(model, cache)).logits
        with pytest.raises(PruningNotSupported, match=r"crop\(-3\).*only 2 were added"):
            cache.crop(-3)
        fresh = cache_in(model(input_ids=prompt, use_cache=True))
        model(input_ids=torch.tensor([[5]]), **cache_argument(model, fresh))
        direct = model(input_ids=torch.tensor([[8]]), **cache_argument(model, fresh)).logits
    torch.testing.assert_close(once, direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_protection_of_each_row_holds_for_its_beams_and_answers(model, prompt, how):
    times = max(how.values(), key=int)
    rows = torch.cat([prompt, prompt.flip(1)])
    protect = torch.zeros(2, 64, dtype=torch.bool)
    protect[0, 20:30], protect[1, 40:44] = True, True
    with token_pruning(model, CONFIG, scorers.recency(), protect=protect) as trace:
        model.generate(rows, max_new_tokens=3, **how)
    kept = [set(row.tolist()) for row in trace.kept_positions[4]]
    assert len(kept) == 2 * times
    for row in range(times):
        assert kept[row] >= set(range(20, 30)) and not kept[times + row] >= set(range(20, 30))
        assert kept[times + row] >= set(range(40, 44))
