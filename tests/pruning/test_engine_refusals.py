"""What pruning cannot serve is refused before any compute, by name and with the remedy."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import StaticCache

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.architectures.layers import describe
from tests.pruning.model_state import Counter, hooks_of

CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.arange(3, 67)[None]


def _refused(model, match, act, error=PruningNotSupported, config=CONFIG, scorer=None):
    counter = Counter(model)
    before = hooks_of(model)
    # Without `verify`, which computes on entry where this release has not swept this transformers.
    with pytest.raises(error, match=match), token_pruning(model, config, scorer or scorers.recency(), verify="never"):
        act(model)
    assert counter.calls == 0, "something was computed before the refusal"
    assert hooks_of(model) == before


def test_a_static_cache_is_refused(tiny_model):
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=128)
    _refused(model, "StaticCache.*dynamic", lambda model: model(input_ids=PROMPT, **cache_argument(model, cache)))


def test_labels_and_logits_to_keep_that_cannot_match_are_refused(tiny_model):
    model = tiny_model()
    _refused(model, "labels=.*trace.kept_positions", lambda model: model(input_ids=PROMPT, labels=PROMPT))
    _refused(model, "as a tensor", lambda model: model(input_ids=PROMPT, logits_to_keep=torch.tensor([3, 5])))
    _refused(model, "logits_to_keep=23 is more than the 22", lambda model: model(PROMPT, logits_to_keep=23))


def test_logits_to_keep_within_the_kept_tokens_gives_their_last_ones(tiny_model):
    model = tiny_model()
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        full = model(input_ids=PROMPT).logits
        last = model(input_ids=PROMPT, logits_to_keep=22).logits
        one = model(input_ids=PROMPT, logits_to_keep=1).logits
    torch.testing.assert_close(last, full)
    torch.testing.assert_close(one, full[:, -1:])


@pytest.mark.parametrize(
    "mask",
    [[1] * 60 + [0] * 4, [1] * 30 + [0] * 4 + [1] * 30, [0] * 64],
    ids=["right padding", "a hole", "an empty row"],
)
def test_padding_that_is_not_on_the_left_is_refused(tiny_model, mask):
    mask = torch.tensor([mask])
    _refused(tiny_model(), "padding_side = 'left'", lambda model: model(input_ids=PROMPT, attention_mask=mask))


def test_a_four_dimensional_mask_is_refused(tiny_model):
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    _refused(tiny_model(), r"\(1, 1, 64, 64\).*2-D", lambda model: model(input_ids=PROMPT, attention_mask=mask))


def test_training_mode_is_refused(tiny_model):
    _refused(tiny_model().train(), r"training mode.*model\.eval\(\)", lambda model: model(input_ids=PROMPT))


def test_layers_beyond_the_model_and_missing_scores_are_refused_on_entry(tiny_model):
    far = PruningConfig(layers=(4, 9))
    _refused(tiny_model(), r"names \[9\].*6 decoder layers", lambda model: None, ValueError, far)
    _refused(tiny_model(), "cannot be called", lambda model: None, ValueError, scorer=5)
    _refused(tiny_model(), "not a PruningConfig", lambda model: None, ValueError, config={"layers": (1,)})


def test_a_nested_with_on_the_same_model_is_refused_and_another_model_is_not(tiny_model):
    model, other = tiny_model(), tiny_model(seed=1)
    with token_pruning(model, CONFIG, scorers.recency()):
        with (
            pytest.raises(PruningNotSupported, match="already inside"),
            token_pruning(model, CONFIG, scorers.recency()),
        ):
            pass
        with token_pruning(other, CONFIG, scorers.recency()) as trace:
            other(input_ids=PROMPT)
        assert trace.prefills == 1
    with token_pruning(model, CONFIG, scorers.recency()) as trace:
        model(input_ids=PROMPT)
    assert trace.prefills == 1


def test_a_second_thread_cannot_enter_the_same_model(tiny_model):
    model, caught = tiny_model(), []

    def enter():
        try:
            with token_pruning(model, CONFIG, scorers.recency()):
                pass
        except PruningNotSupported as error:
            caught.append(str(error))

    with token_pruning(model, CONFIG, scorers.recency()):
        worker = threading.Thread(target=enter)
        worker.start()
        worker.join()
    assert len(caught) == 1
    assert "another thread" in caught[0]


def test_a_second_thread_that_runs_the_model_during_a_forward_is_refused_and_the_first_goes_on(tiny_model):
    model, caught = tiny_model(), []

    def intrude():
        try:
            model(input_ids=PROMPT)
        except PruningNotSupported as error:
            caught.append(str(error))

    def scorer(stage):
        if stage.layer_index == 1:
            worker = threading.Thread(target=intrude)
            worker.start()
            worker.join()
        return stage.positions.float()

    with torch.no_grad(), token_pruning(model, CONFIG, scorer) as trace:
        logits = model(input_ids=PROMPT).logits
    assert "second thread" in caught[0]
    assert trace.prefills == 1
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()):
        assert torch.equal(model(input_ids=PROMPT).logits, logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_name_their_layer(tiny_model, value):
    def scorer(stage):
        scores = stage.positions.float()
        return scores.masked_fill(stage.positions == 5, value) if stage.layer_index == 3 else scores

    model, config = tiny_model(), CONFIG.replace(sink_tokens=8)
    with pytest.raises(PruningNotSupported, match="not finite at layer 3"), token_pruning(model, config, scorer):
        model(input_ids=PROMPT)


def test_scores_of_the_wrong_shape_are_refused_with_the_right_one(tiny_model):
    model = tiny_model()
    with (
        pytest.raises(ValueError, match=r"returned \(1, 3\) at layer 1.*\(1, 64\)"),
        token_pruning(model, CONFIG, lambda stage: torch.zeros(1, 3)),
    ):
        model(input_ids=PROMPT)


def test_a_prompt_too_short_to_prune_warns_once_and_is_left_whole(tiny_model):
    model, short = tiny_model(), PROMPT[:, :10]
    plain = model(input_ids=short).logits
    config = PruningConfig(layers=(1, 3), keep_ratio=0.7)
    with (
        pytest.warns(UserWarning, match="10 tokens is too short") as caught,
        token_pruning(model, config, scorers.recency()) as trace,
    ):
        assert torch.equal(model(input_ids=short).logits, plain)
        model(input_ids=short)
    assert len(caught) == 1
    assert trace.tokens_per_layer == [10] * 6
    assert trace.kept_positions[3].tolist() == [list(range(10))]


def test_a_prompt_of_one_token_is_a_prefill_and_an_empty_one_is_said(tiny_model):
    model = tiny_model()
    with pytest.warns(UserWarning, match="1 tokens is too short"), token_pruning(model, CONFIG, scorers.recency()) as t:
        assert model(input_ids=PROMPT[:, :1]).logits.shape == (1, 1, 128)
    assert t.tokens_per_layer == [1] * 6
    _refused(model, "no tokens", lambda model: model(input_ids=PROMPT[:, :0]), ValueError)
    with token_pruning(model, CONFIG, scorers.recency()) as t, pytest.raises(ValueError, match="the trace is empty"):
        _ = t.tokens_per_layer


@pytest.mark.parametrize("prompt", [torch.arange(3, 43), list(range(3, 43)), torch.tensor(3)])
def test_a_prompt_without_rows_is_refused_by_its_shape(tiny_model, prompt):
    model = tiny_model()
    with token_pruning(model, CONFIG, scorers.recency()), pytest.raises(ValueError, match="the prompt is a .*: give"):
        model(input_ids=prompt)


def test_a_model_is_not_copied_with_the_hooks_of_a_with_in_it(tiny_model):
    """It ended as ``cannot pickle '_thread.lock' object``."""
    model = tiny_model()
    with token_pruning(model, CONFIG, scorers.recency()) as trace:
        with pytest.raises(PruningNotSupported, match="cannot be copied inside a `with token_pruning"):
            copy.deepcopy(model)
        with torch.no_grad():
            model(input_ids=torch.arange(3, 67)[None])
    assert trace.prefills == 1 and hooks_of(copy.deepcopy(model)) == hooks_of(model)


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32))
    with pytest.raises(PruningNotSupported, match="encoder-decoder"):
        describe(t5)


def test_a_compiled_model_is_refused(tiny_model):
    with pytest.raises(PruningNotSupported, match="torch.compile"):
        describe(torch.compile(tiny_model()))


@pytest.mark.parametrize("what", ["forward", "decoder", "decoder forward", "layer forward"])
def test_a_part_that_is_compiled_is_refused_too(tiny_model, what):
    """Compiled code that had run before ignored the hooks: nothing was pruned, and the trace said that it was."""
    model = tiny_model()
    if what == "decoder":
        model.model = torch.compile(model.model, backend="eager")
    else:
        part = {"forward": model, "decoder forward": model.model, "layer forward": model.model.layers[2]}[what]
        part.forward = torch.compile(part.forward, backend="eager")
    with pytest.raises(PruningNotSupported, match="torch.compile"), token_pruning(model, CONFIG, scorers.recency()):
        pass


def test_a_scorer_that_writes_into_the_models_numbers_is_refused(tiny_model):
    def careless(stage):
        hidden = stage.hidden_states
        hidden /= hidden.norm(dim=-1, keepdim=True)
        return hidden[..., 0]

    model = tiny_model()
    with (
        torch.no_grad(),
        pytest.raises(PruningNotSupported, match=r"scorer=careless writes into stage.hidden_states at layer 1"),
        token_pruning(model, CONFIG, careless),
    ):
        model(PROMPT)


def test_generate_does_not_go_on_from_another_token_than_the_last(tiny_model):
    config = CONFIG.replace(local_ratio=0.0, min_local_tokens=0, sink_tokens=0)
    model, counter = tiny_model(), None
    with torch.no_grad(), token_pruning(model, config.replace(keep_ratio=0.001), scorers.random()) as trace:
        model(PROMPT)
    assert trace.tokens_per_layer[-1] == 1, "never none"
    counter = Counter(model)
    with (
        pytest.raises(PruningNotSupported, match="min_local_tokens=0 with local_ratio=0 .* give min_local_tokens=1"),
        token_pruning(model, config, scorers.random()),
    ):
        model.generate(PROMPT, max_new_tokens=2)
    assert not counter.calls


def test_a_score_of_all_attention_is_refused_after_a_prefix(tiny_model):
    model = tiny_model()
    config = CONFIG.replace(prune="every")
    with torch.no_grad(), token_pruning(model, config, scorers.attention(query="none")):
        cache = cache_in(model(PROMPT, use_cache=True))
        with pytest.raises(PruningNotSupported, match="prune='every' with a scorer that reads what all tokens attend"):
            model(PROMPT, **cache_argument(model, cache))


def test_a_layer_with_an_unknown_argument_is_refused_by_its_name(tiny_model):
    model = tiny_model()

    class Strange(type(model.model.layers[1])):
        def forward(self, hidden_states, attention_mask=None, past_key_values=None, token_graph=None):
            return hidden_states

    model.model.layers[1].__class__ = Strange
    with pytest.raises(PruningNotSupported, match=r"decoder layer 1 \(Strange\).*token_graph"):
        describe(model)


def test_an_unknown_attention_backend_is_refused(tiny_model):
    model = tiny_model()
    model.config._attn_implementation = "attention_of_my_own"
    _refused(model, "attn_implementation='attention_of_my_own", lambda model: None)


def test_compact_positions_are_refused_for_batches_and_for_models_without_one_rotary_table(tiny_model):
    compact = CONFIG.replace(positions="compact")
    pair = PROMPT.expand(2, -1)
    _refused(tiny_model(), "batch of 2", lambda model: model(input_ids=pair), config=compact)
    _refused(tiny_model("bloom"), "positions='compact'", lambda model: None, config=compact)


def test_flash_attention_with_a_window_shorter_than_the_prompt_is_refused(tiny_model):
    model = tiny_model("mistral", sliding_window=20)
    model.config._attn_implementation = "flash_attention_2"
    counter = Counter(model)
    with (
        pytest.raises(PruningNotSupported, match=r"sliding window \(20\)"),
        token_pruning(model, CONFIG, scorers.recency()),
    ):
        model.model(input_ids=PROMPT)
    assert counter.calls == 0


def test_the_prune_log_and_the_frame_tell_what_was_dropped(tiny_model, tmp_path):
    import json

    model = tiny_model()
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()) as trace:
        model(input_ids=PROMPT)
    entries = [json.loads(line) for line in trace.write_log(tmp_path / "prune.jsonl").read_text().splitlines()]
    assert entries[0] == {
        "layer": 1, "row": 0, "tokens_in": 64, "tokens_kept": 38, "tokens_pruned": 26,
        "score_min": 0.0, "score_max": 63.0, "score_mean": 31.5,
    }  # fmt: skip
    assert [entry["tokens_kept"] for entry in entries] == [38, 22]
    frame = trace.to_frame()
    assert list(frame.columns) == ["row", "layer", "position", "score", "kept"]
    assert frame.groupby("layer").kept.sum().to_dict() == {1: 38, 3: 22}
    assert trace.compression_ratio == pytest.approx(64 / ((64 + 38 + 38 + 22 * 3) / 6))
