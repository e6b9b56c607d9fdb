"""The token pruners: inputs, what they refuse, dtypes and devices."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from sdtp_lib.config import PruningConfig
from sdtp_lib.provenance import fingerprint
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.scorers import token_pruners
from sdtp_lib.scorers.blend import average_of_neighbours, standardised
from sdtp_lib.scorers.stage_network import StageInputs
from sdtp_lib.scorers.token_pruners import TokenPruners

LAYERS = (1, 2)


ALL = ("hidden", "distance", "query", "attention")


def inputs(tokens=40, batch=2, size=32, padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, size, generator=generator)
    positions = torch.arange(tokens).expand(batch, -1).clone()
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    if padding:
        positions[0] = torch.cat([torch.full((padding,), -1), torch.arange(tokens - padding)])
        valid[0, :padding] = False
    return hidden, positions, valid, valid.sum(-1)


def score(pruners, layer, *given):
    return pruners.score(layer, StageInputs(*given))


def pruners_with(features=("hidden",), **options):
    torch.manual_seed(0)
    sizes = {"query_rank": 8, "query_heads": 2, "query_window": 6, "attention_heads": 2}
    return TokenPruners(32, LAYERS, features=features, **{**sizes, **options})


def test_the_default_pruner_is_the_papers_two_matrices_with_one_output():
    pruners = TokenPruners(32, LAYERS)
    shapes = {name: tuple(p.shape) for name, p in pruners.named_parameters()}
    assert shapes == {
        f"stages.{layer}.{name}": shape
        for layer in LAYERS
        for name, shape in {"down.weight": (8, 32), "down.bias": (8,), "out.weight": (1, 8), "out.bias": (1,)}.items()
    }
    assert pruners.flops_per_token() == 2 * 32 * 8 + 2 * 8


@pytest.mark.parametrize("features", [("hidden",), ("hidden", "distance"), ("hidden", "distance", "query")])
def test_a_reload_gives_the_same_scores_and_knows_where_it_belongs(tmp_path, features):
    pruners = pruners_with(features, base_model="m", model_type="llama", num_layers=3)
    pruners.save_pretrained(tmp_path)
    again = TokenPruners.from_pretrained(tmp_path)
    assert (again.layers, again.features, again.base_model) == (LAYERS, features, "m")
    for layer in LAYERS:
        assert torch.equal(score(again, layer, *inputs()), score(pruners, layer, *inputs()))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in files if not name.endswith((".json", ".safetensors", ".md"))] == []
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert all(name.startswith("stages.") for name in stored.keys())  # noqa: SIM118 - safe_open is no mapping


@pytest.mark.parametrize("features", [("hidden",), ("hidden", "distance", "query")])
def test_a_padded_row_scores_like_the_same_row_alone(features):
    pruners = pruners_with(features)
    hidden, positions, valid, lengths = inputs(padding=5)
    together = score(pruners, 1, hidden, positions, valid, lengths)[0, 5:]
    alone = score(pruners, 1, hidden[:1, 5:], positions[:1, 5:], valid[:1, 5:], lengths[:1])[0]
    torch.testing.assert_close(together, alone)


def test_scores_do_not_depend_on_the_scale_of_the_hidden_state():
    pruners = pruners_with()
    hidden, *rest = inputs()
    torch.testing.assert_close(
        score(pruners, 1, 100 * hidden, *rest), score(pruners, 1, hidden, *rest), rtol=1e-3, atol=1e-4
    )


def test_distance_is_counted_in_the_original_prompt_also_after_a_cut():
    pruners = pruners_with(("hidden", "distance"))
    hidden, positions, valid, lengths = inputs(batch=1)
    whole = score(pruners, 1, hidden, positions, valid, lengths)
    kept = torch.tensor([0, 3, 4, 9, 20, 38, 39])
    cut = score(pruners, 1, hidden[:, kept], positions[:, kept], valid[:, kept], lengths)
    torch.testing.assert_close(cut, whole[:, kept])


def test_the_query_term_lets_the_last_tokens_change_an_early_tokens_score():
    hidden, positions, valid, lengths = inputs(batch=1)
    other = hidden.clone()
    other[:, -3:] = torch.randn(1, 3, 32)
    blind, with_query = pruners_with(("hidden", "distance")), pruners_with(("hidden", "query"))
    rest = (positions, valid, lengths)
    assert torch.equal(score(blind, 1, hidden, *rest)[:, :30], score(blind, 1, other, *rest)[:, :30])
    assert not torch.allclose(score(with_query, 1, hidden, *rest)[:, :30], score(with_query, 1, other, *rest)[:, :30])


@pytest.mark.parametrize("kernel", [3, 7, 101])
def test_a_passage_is_the_mean_of_the_kept_tokens_around(kernel):
    valid = inputs(padding=5)[2]
    values = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1)) * 100
    found = average_of_neighbours(values.transpose(1, 2), valid, kernel).transpose(1, 2)
    for row, at in [(0, 5), (0, 20), (0, 39), (1, 0), (1, 39)]:
        around = range(max(0, at - kernel // 2), min(40, at + kernel // 2 + 1))
        kept = [place for place in around if valid[row, place]]
        torch.testing.assert_close(found[row, at], values[row, kept].mean(0), rtol=1e-4, atol=1e-4)


def test_with_passages_a_token_hears_what_its_neighbours_are_asked():
    hidden, positions, valid, lengths = inputs(batch=1)
    asked = torch.zeros(1, 40, 6)
    other = asked.clone()
    other[0, 10] = 1.0
    for passage_tokens, reach in ((0, 1), (9, 4)):  # without passages: the strongest of three neighbours
        pruners = pruners_with(ALL, attention_kernel=3, passage_tokens=passage_tokens)
        told, silent = (score(pruners, 1, hidden, positions, valid, lengths, paid)[0] for paid in (other, asked))
        assert (told != silent).nonzero().flatten().tolist() == list(range(10 - reach, 10 + reach + 1))


def test_a_stage_remembers_what_the_one_before_thought_of_the_tokens_that_are_left(tiny_model):
    model, seen = tiny_model(), []
    ids = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    pruners = TokenPruners.for_model(model, LAYERS, features=("hidden", "memory"))

    def scorer(stage):
        seen.append((stage.positions, {name: values.clone() for name, values in stage.carried.items()}))
        return pruners(stage)

    config = PruningConfig(LAYERS, 0.7, min_local_tokens=4)
    with token_pruning(model, config, scorer) as trace, torch.no_grad():
        model(ids)
    assert seen[0][1] == {}, "nothing is remembered at the first stage"
    places, (remembered,) = seen[1][0], seen[1][1].values()
    first = trace.scores[LAYERS[0]]
    assert remembered.shape == places.shape == (1, trace.kept_positions[LAYERS[0]].shape[1])
    torch.testing.assert_close(remembered, standardised(first, torch.ones_like(first, dtype=torch.bool))[:, places[0]])
    hidden, *rest = inputs(batch=1)
    memory = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    told, silent = (score(pruners_with(("hidden", "memory")), 2, hidden, *rest, None, m) for m in (memory, None))
    assert (told != silent).all()


def test_every_parameter_gets_a_gradient():
    pruners = pruners_with(("hidden", "distance", "query"))
    sum(score(pruners, layer, *inputs()).square().mean() for layer in LAYERS).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pruners.parameters())


def test_bfloat16_hidden_states_are_scored_close_to_float32():
    pruners = pruners_with(("hidden", "distance", "query"))
    hidden, *rest = inputs()
    exact, coarse = score(pruners, 1, hidden, *rest), score(pruners, 1, hidden.bfloat16(), *rest)
    assert coarse.dtype == torch.float32
    assert (exact - coarse).abs().max() < 0.05


def test_missing_layers_are_named_beside_those_that_exist():
    config = SimpleNamespace(layers=(1, 2, 3))
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] names \[3\].*\[1, 2\]"):
        pruners_with().check(SimpleNamespace(), config)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"features": ("distance",)}, "features"),
        ({"features": ("hidden", "smell")}, "features"),
        ({"query_rank": 7, "query_heads": 2}, "query_rank=7"),
        ({"features": ("hidden", "attention"), "attention_heads": None}, "attention_heads=None"),
        ({"features": ("hidden", "attention"), "attention_heads": 2, "attention_kernel": 4}, "attention_kernel=4"),
        ({"features": ("hidden", "query"), "passage_tokens": 4}, "passage_tokens=4"),
        ({"features": ("hidden", "distance"), "passage_tokens": 5}, "passage_tokens=5"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        TokenPruners(32, LAYERS, **options)


def test_another_model_is_refused_and_other_weights_are_warned_of(tiny_model):
    model = tiny_model()
    config = SimpleNamespace(layers=(1,))
    pruners = TokenPruners.for_model(model, (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruners.check(model, config)
    other = tiny_model(num_hidden_layers=model.config.num_hidden_layers + 1)
    with pytest.raises(ValueError, match="num_layers"):
        pruners.check(other, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    with pytest.warns(UserWarning, match="other weights"):
        pruners.check(model, config)


def test_the_fingerprint_is_read_once_and_again_after_a_change_and_keeps_no_model_alive(tiny_model, monkeypatch):
    model, read = tiny_model(), []
    monkeypatch.setattr(token_pruners, "fingerprint", lambda model: read.append(1) or fingerprint(model))
    first = token_pruners.weights_fingerprint(model)
    assert token_pruners.weights_fingerprint(model) == first == fingerprint(model) and len(read) == 1
    weight = next(p for p in model.parameters() if p.ndim == 2)
    with torch.no_grad():
        weight.mul_(2)
    changed = token_pruners.weights_fingerprint(model)
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.ones_like(model.get_input_embeddings().weight))
    assert len({first, changed, token_pruners.weights_fingerprint(model)}) == 3
    with torch.inference_mode():
        made_inside = tiny_model()
    assert token_pruners.weights_fingerprint(made_inside) == fingerprint(made_inside)
    alive = weakref.ref(model)
    del model, weight
    gc.collect()
    assert alive() is None


def test_scores_of_a_prompt_do_not_depend_on_what_stands_after_it():
    """In training the response follows in the same row; the query term once read it instead of the prompt."""
    torch.manual_seed(0)
    pruners = TokenPruners(16, (2,), features=("hidden", "distance", "query"), query_rank=8, query_heads=4)
    hidden = torch.randn(1, 40, 16)
    alone = score(
        pruners, 2, hidden[:, :20], torch.arange(20)[None], torch.ones(1, 20, dtype=torch.bool), torch.tensor([20])
    )
    valid = torch.arange(40)[None] < 20
    positions = torch.arange(40)[None].masked_fill(~valid, -1)
    scores = score(pruners, 2, hidden, positions, valid, torch.tensor([20]))
    torch.testing.assert_close(scores[:, :20], alone)
    scores[:, :20].sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pruners.parameters())


def paid_attention(tokens=40, batch=2, seed=3):
    """(B, n, A) a made-up share of 16 query tokens' attention to each token, for two heads in three layers."""
    generator = torch.Generator().manual_seed(seed)
    return 16 * torch.randn(batch, 6, tokens, generator=generator).mul(2).softmax(dim=-1).transpose(1, 2)


def test_a_token_that_heads_look_at_may_score_otherwise_and_so_may_its_neighbours_only():
    pruners, paid = pruners_with(ALL), paid_attention()
    other = paid.clone()
    other[:, 20, 1] += 5.0
    change = (score(pruners, 1, *inputs(), other) - score(pruners, 1, *inputs(), paid)).abs().detach()
    assert (change[:, 17:24] > 1e-6).all(), "three neighbours on each side see the strongest"
    assert change[:, :17].max() < 1e-6 and change[:, 24:].max() < 1e-6


def test_attention_counts_in_units_of_an_even_share_so_that_length_alone_changes_nothing():
    pruners = pruners_with(("hidden", "attention"))
    for tokens in (20, 40):
        hidden, *rest = inputs(tokens=tokens)
        even = torch.full((2, tokens, 6), 16 / tokens)
        scores = score(pruners, 1, torch.ones_like(hidden), *rest, even)
        torch.testing.assert_close(scores, scores[:1, :1].expand_as(scores))
        torch.testing.assert_close(scores[0, 0], score(pruners, 1, torch.ones(1, 8, 32), *inputs(8, 1)[1:],
                                                               torch.full((1, 8, 6), 2.0))[0, 0])  # fmt: skip


def test_looking_back_never_crosses_the_stage_in_front():
    pruners = TokenPruners(32, (1, 4, 5, 9), features=("hidden", "attention"), attention_heads=2)
    assert pruners.earlier_layers == {1: (0, 0, 0), 4: (1, 2, 3), 5: (4, 4, 4), 9: (6, 7, 8)}
    assert TokenPruners(32, (1, 4)).earlier_layers == {}


def test_with_all_inputs_pruners_stay_below_a_hundredth_of_a_small_models_prefill():
    from sdtp_lib.budget import ModelShape, prefill_flops

    shape = ModelShape(
        num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536,
        vocab_size=49152,
    )  # fmt: skip
    pruners = TokenPruners(576, tuple(range(4, 30, 3)), width=96, features=ALL, attention_heads=9)
    share = pruners.flops_per_token() * 1024 * len(pruners.layers) / prefill_flops(shape, [1024] * 30)
    assert 0.002 < share < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("features", [("hidden",), ALL])
def test_pruners_of_another_dtype_score_as_before_within_its_rounding(dtype, features):
    """``pruners.to(torch.bfloat16)`` ended in "mat1 and mat2 must have the same dtype"."""
    pruners = pruners_with(features).requires_grad_(False)
    paid = paid_attention() if "attention" in features else None
    before = score(pruners, 1, *inputs(), paid)
    after = score(pruners.to(dtype), 1, *inputs(), paid)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.05)


def test_pruners_serve_a_model_whose_embedding_is_offloaded(tiny_model):
    accelerate = pytest.importorskip("accelerate")
    model, config = tiny_model(), PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4)
    pruners = TokenPruners.for_model(model, config.layers)
    ids = torch.arange(3, 67)[None]
    with torch.no_grad(), token_pruning(model, config, pruners) as trace:
        model(input_ids=ids)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad(), token_pruning(offloaded, config, pruners) as again:
        offloaded(input_ids=ids)
    assert torch.equal(again.kept_positions[3], trace.kept_positions[3])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"layers": [0]}, "the first layer that can be pruned is 1"),
        ({"layers": [4, 4]}, "name each layer once"),
        ({"layers": 4}, "layers=4 is not a list"),
        ({"layers": []}, "names no layer"),
        ({"width": 2.5}, "width=2.5 is not a whole number"),
        ({"width": 0}, "width=0 is not a size"),
        ({"num_layers": "x"}, "num_layers='x' is not a whole number"),
        ({"attention_heads": -1}, "attention_heads=-1 is not a size"),
        ({"attention_kernel": "7"}, "attention_kernel='7' is not a whole number"),
        ({"attention_kernel": 3.5}, "attention_kernel=3.5 is not a whole number"),
        ({"passage_tokens": "3"}, "passage_tokens='3' is not a whole number"),
        ({"passage_tokens": -3}, "passage_tokens=-3 is no odd number of neighbours: give 0"),
        ({"blend": {"learned": "x"}}, "learned='x' is not a number"),
        ({"blend": {"recency": True}}, "recency=True is not a number"),
        ({"blend": {"learned": float("inf")}}, "learned=inf is no weight: give a finite number"),
        ({"width": torch.tensor(2.5)}, r"width=tensor\(2.5000\) is not a whole number"),
        ({"width": torch.tensor(True)}, r"width=tensor\(True\) is not a whole number"),
        ({"width": torch.tensor([3, 4])}, r"width=tensor\(\[3, 4\]\) is not a whole number"),
        ({"width": int}, "width=<class 'int'> is not a whole number"),
        ({"blend": {"floor": float("nan")}}, "floor=nan is not a number"),
        ({"blend": {"smoothing": "3"}}, "smoothing='3' is not a whole number"),
        ({"blend": {"window": None}}, "window=None is not a whole number"),
        ({"query_window": 0}, "query_window=0 is not a size"),
        ({"query_heads": 0}, "query_heads=0 is not a size"),
        ({"blend": {"foo": 1}}, r"blend has unknown fields \['foo'\]: known are learned"),
    ],
)
def test_nonsense_sizes_are_refused_by_name(fields, match):
    with pytest.raises(ValueError, match=match):
        TokenPruners(**{"hidden_size": 32, "layers": (1, 3), **fields})


def test_pruners_that_read_attention_fit_models_of_as_many_heads(tiny_model):
    pruners = TokenPruners(32, (3,), features=("hidden", "attention"), attention_heads=8)
    with pytest.raises(ValueError, match="attention_heads=8 of these pruners .* does not fit the model's 4"):
        pruners.check(tiny_model(), PruningConfig(layers=(3,)))
