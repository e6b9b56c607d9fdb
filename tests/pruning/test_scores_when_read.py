"""Where nothing can be dropped nothing is scored, until somebody reads the scores: then they are what they would be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sdtp_lib import PruningConfig, PruningNotSupported, TokenPruners, scorers, token_pruning
from tests.reference import louder

WHOLE = PruningConfig(layers=(1, 3, 4), keep_ratio=1.0, min_local_tokens=4)
PROMPT = torch.randint(3, 128, (1, 50), generator=torch.Generator().manual_seed(1))
ALL = ("hidden", "distance", "query", "attention", "memory")


def _counted(scorer):
    calls = []

    def counting(stage):
        calls.append(stage.layer_index)
        return scorer(stage)

    return counting, calls


def _rows():
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, :20] = 0
    return {"input_ids": PROMPT.repeat(2, 1) * mask, "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}  # fmt: skip


@pytest.mark.parametrize("inputs", [{"input_ids": PROMPT}, _rows()], ids=["one row", "packed rows"])
@pytest.mark.parametrize("kind", ["attention", "learned"])
def test_scores_that_are_read_after_decoding_are_those_of_the_prefill(tiny_model, kind, inputs):
    """Learned pruners carry a memory from stage to stage; a scorer may look back at keys that the cache held then."""
    model = louder(tiny_model())
    torch.manual_seed(0)
    scorer = scorers.attention(4) if kind == "attention" else TokenPruners.for_model(model, WHOLE.layers, features=ALL)
    scorer, calls = _counted(scorer)
    with torch.inference_mode(), token_pruning(model, WHOLE, scorer) as expected:
        model(**inputs, use_cache=True)
    assert calls == [1, 3, 4], "under inference_mode at once"
    calls.clear()
    with torch.no_grad(), token_pruning(model, WHOLE, scorer) as trace:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert list(trace.kept_positions) == list(trace.scored_positions) == [1, 3, 4]
    assert not calls
    for layer in WHOLE.layers:
        torch.testing.assert_close(trace.scores[layer], expected.scores[layer])
    assert calls == [1, 3, 4], "once each"


def test_where_one_stage_drops_tokens_all_are_scored_at_once(tiny_model):
    scorer, calls = _counted(scorers.recency())
    model = tiny_model()
    with torch.no_grad(), token_pruning(model, WHOLE.replace(keep_ratio=(1.0, 1.0, 0.6)), scorer):
        model(input_ids=PROMPT)
        assert calls == [1, 3, 4]


def test_a_trace_that_travels_takes_its_scores_along(tiny_model):
    model = tiny_model()
    with torch.no_grad(), token_pruning(model, WHOLE, scorers.recency()) as trace:
        model(input_ids=PROMPT)
    for copied in (pickle.loads(pickle.dumps(trace)), copy.deepcopy(trace)):
        assert torch.equal(copied.scores[3], trace.scores[3])
    assert len(trace.to_frame()) == 3 * 50


def test_a_new_prefill_forgets_scores_that_nobody_read(tiny_model):
    model = tiny_model()
    scorer, calls = _counted(scorers.recency())
    with torch.no_grad(), token_pruning(model, WHOLE, scorer) as trace:
        model(input_ids=PROMPT)
        model(input_ids=PROMPT[:, :30])
        assert trace.scores[1].shape == (1, 30)
    assert calls == [1, 3, 4]


def test_scores_that_are_not_finite_are_refused_when_they_are_read(tiny_model):
    model = tiny_model()
    with torch.no_grad(), token_pruning(model, WHOLE, lambda stage: stage.positions * torch.nan) as trace:
        model(input_ids=PROMPT)
        with pytest.raises(PruningNotSupported, match="not finite"):
            _ = trace.scores


def test_hidden_states_that_were_written_into_since_are_refused(tiny_model):
    model = tiny_model()
    handle = model.model.layers[3].register_forward_hook(lambda _m, args, _o: bool(args[0].add_(1).sum()) and None)
    with torch.no_grad(), token_pruning(model, WHOLE, scorers.hidden_norm()) as trace:
        model(input_ids=PROMPT)
        with pytest.raises(PruningNotSupported, match=r"layer 3.*inference_mode"):
            _ = trace.scores
    handle.remove()


@pytest.mark.parametrize("change", ["write", "convert"])
def test_scores_are_refused_where_the_layers_weights_have_changed_since(tiny_model, change):
    model = tiny_model()
    with torch.no_grad(), token_pruning(model, WHOLE, scorers.attention(4)) as trace:
        model(PROMPT)
    if change == "convert":
        model.to(torch.bfloat16)
    else:
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(PruningNotSupported, match="layer 1 .* weights were changed, moved or converted"):
        _ = trace.scores[1]
