"""Each method against a slow, literal form of its paper's rule: attention as full T x T matrices, tokens one by one.

The literal form runs the decoder layers itself, one after the other, on whatever its rule has left, and shares nothing
with the engine or the methods but the model's weights.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch

from sdtp_lib import methods, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_in
from tests.reference import louder

TOKENS = 300


@pytest.fixture(scope="module")
def model(tiny_model):
    return louder(tiny_model(dtype=torch.float64, attn_implementation="eager", num_hidden_layers=8))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def products(model, index, hidden, positions):
    """Scaled query-key products (H, n, n) of layer ``index``, -inf above the diagonal; and its keys (G, n, d)."""
    layer = model.model.layers[index]
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    cos, sin = model.model.rotary_emb(hidden, position_ids=positions[None])
    heads = [getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, 8)).transpose(1, 2) for which in "qk"]
    query, key = sys.modules[type(attention).__module__].apply_rotary_pos_emb(*heads, cos, sin)
    shared = query.shape[1] // key.shape[1]
    logits = torch.stack([query[0, h] @ key[0, h // shared].T for h in range(query.shape[1])]) * attention.scaling
    return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -math.inf), key[0]


def literal(model, ids, rule):
    """Run the layers; before layer l keep the columns that ``rule(l, weights, logits, n)`` names (None: all).

    ``weights[k]`` are softmax weights (H, n, n) of layer k among tokens since the last cut, k <= l. Returns the
    positions kept before each layer, and each layer's weights and keys.
    """
    hidden, positions = model.model.embed_tokens(ids), torch.arange(ids.shape[1])
    kept, weights, logits, layers = {}, {}, {}, {}
    for index, layer in enumerate(model.model.layers):
        found = products(model, index, hidden, positions)[0]
        weights[index], logits[index] = found.softmax(-1), found
        columns = rule(index, weights, logits, len(positions))
        if columns is not None:
            columns = torch.tensor(sorted(columns))
            hidden, positions, weights, logits = hidden[:, columns], positions[columns], {}, {}
            found = products(model, index, hidden, positions)[0]
            weights[index], logits[index] = found.softmax(-1), found
        kept[index] = positions
        layers[index] = (weights[index], products(model, index, hidden, positions)[1])
        mask = torch.zeros_like(found[:1]).masked_fill(found[:1] == -math.inf, torch.finfo(torch.float64).min)[None]
        tables = model.model.rotary_emb(hidden, position_ids=positions[None])
        hidden = layer(hidden, attention_mask=mask, position_embeddings=tables)
    return kept, layers


def best(scores, count, always=()):
    """The ``count`` best of ``scores`` (a list), those of ``always`` first."""
    order = sorted(range(len(scores)), key=lambda j: (j not in always, -scores[j], -j))
    return order[:count]


def pooled(values, kernel):
    """Means over ``kernel`` neighbours, zeros beyond the ends."""
    half, n = kernel // 2, len(values)
    return [sum(values[i] for i in range(j - half, j + half + 1) if 0 <= i < n) / kernel for j in range(n)]


def observed(weights, window, kernel):
    """FastKV's and SnapKV's score of each token before the window, per head: (H lists)."""
    n = weights.shape[-1]
    return [pooled([float(head[n - window :, j].sum()) for j in range(n - window)], kernel) for head in weights]


def summed(lists):
    return [sum(values) for values in zip(*lists, strict=True)]


def block_scores(values, size):
    blocks = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(block) / len(block) for block in blocks]


def lazyllm(index, weights, logits, n):
    left = {2: 0.7, 5: 0.5 / 0.7, 7: 0.3 / 0.5}
    if index in left:
        paid = [sum(float(head[-1, j]) for head in weights[index - 1]) / 4 for j in range(n)]
        return best(paid, math.floor(left[index] * n + 1e-9), {n - 1})
    return None


def gemfilter(index, weights, logits, n):
    if index != 3:
        return None
    dots = [float(sum(head[-1, j] for head in logits[3])) for j in range(n)]
    near = [dots[max(0, j - 2) : j + 3] for j in range(n)]
    return best([sum(each) / len(each) for each in near], 60, {n - 1})


def fastkv(index, weights, logits, n):
    if index != 4:
        return None
    scores = summed(observed(weights[3], 8, 7))
    return [*best(scores, int(0.2 * n) - 8), *range(n - 8, n)]


def claa(index, weights, logits, n):
    if index != 4:
        return None
    layers = [summed(observed(weights[k], 8, 7)) for k in (0, 1, 2, 3)]
    return [*best([max(each) for each in zip(*layers, strict=True)], int(0.2 * n) - 8), *range(n - 8, n)]


def sliminfer(index, weights, logits, n):
    kept = {2: 160, 5: 96, 7: 64}.get(index)
    if kept is None:
        return None
    paid = [float(weights[index][:, n - 16 :, j].mean()) for j in range(n)]
    means = block_scores(paid, 16)
    return best([means[j // 16] for j in range(n)], kept, set(range(n - 16, n)))


def uniprefill(index, weights, logits, n):
    if index == 0 or n <= 40:
        return None
    paid = [float(weights[index - 1][:, n - 20 :, j].mean()) for j in range(n)]
    means = block_scores(paid, 16)
    order, stays, held = sorted(range(len(means)), key=lambda b: -means[b]), set(), 0.0
    for block in order:
        stays |= set(range(16 * block, min(n, 16 * block + 16)))
        held += means[block]
        if held >= 0.8 * sum(means):
            break
    return stays | set(range(20)) | set(range(n - 20, n))


def pyramidinfer(index, weights, logits, n):
    if index == 0:
        return None
    recent = int(0.2 * TOKENS) + 1
    share = 0.1 * (math.cos(math.pi * (index - 1) / 8) + 1) / 2 + 0.9
    context = n - recent
    rising = torch.linspace(1.0, 1.2, recent, dtype=torch.float32).double()
    paid = [float((weights[index].mean(0)[context:, j] * rising).mean()) for j in range(context)]
    return [*best(paid, int(context * share), set(range(4))), *range(context, n)]


def streamingllm(index, weights, logits, n):
    return [*range(4), *range(n - 76, n)] if index == 1 else None


class Asl:
    """Ranks of the tokens after each layer; the cut comes where those of the last three differ little."""

    def __init__(self, threshold=0.25):
        self.ranks, self.done, self.threshold = [], False, threshold

    def __call__(self, index, weights, logits, n):
        if self.done or not 2 <= index <= 6:
            return None
        scores = [*summed(observed(weights[index - 1], 8, 7)), *[math.inf] * 8]
        order = best(scores, n)
        self.ranks.append([order.index(j) for j in range(n)])
        last, chosen = self.ranks[-3:], order[: int(0.2 * n)]
        variance = [sum((r[j] - sum(s[j] for s in last) / len(last)) ** 2 for r in last) / len(last) for j in chosen]
        if (len(last) == 3 and sum(variance) / len(chosen) / (n * n / 12) < self.threshold) or index == 6:
            self.done = True
            return chosen
        return None


def spec_chunks(per_query, n, keep=0.3, chunk=16):
    means = block_scores(summed(per_query), chunk)
    chosen = best(means, math.ceil(math.ceil(n / chunk) * keep))
    return {j for j in range(n) if j // chunk in chosen} | {n - 1}


def specprefill(index, weights, logits, n):
    if index != 2:
        return None
    per_query = []
    for query in range(n - 8, n):
        heads = [pooled([float(v) for v in head[query]], 13) for k in (0, 1) for head in weights[k]]
        per_query.append([max(each) for each in zip(*heads, strict=True)])
    return spec_chunks(per_query, n)


# name, settings that give a prompt of 300 tokens and 8 layers something to do, the rule, the layers of its stages
TABLE = [
    ("lazyllm", {}, lazyllm, (2, 5, 7)),
    ("gemfilter", {"tokens": 60}, gemfilter, (3,)),
    ("fastkv", {}, fastkv, (4,)),
    ("claa", {}, claa, (4,)),
    ("sliminfer", {"tokens": (160, 96, 64), "block": 16, "window": 16}, sliminfer, (2, 5, 7)),
    ("uniprefill", {"mass": 0.8, "block": 16, "window": 20, "ends": 20}, uniprefill, tuple(range(1, 8))),
    ("pyramidinfer", {}, pyramidinfer, tuple(range(1, 8))),
    ("streamingllm", {"tokens": 80, "positions": "original"}, streamingllm, (1,)),
    # The ranks of this model differ by 0.24 of chance's variance after three layers, and by more after more.
    ("asl", {"threshold": 0.25, "layers_compared": 3}, Asl, tuple(range(2, 7))),
    ("specprefill", {"keep": 0.3, "chunk": 16}, specprefill, (2,)),
]


def run(model, method, ids, scorer=None, **arguments):
    with torch.no_grad(), token_pruning(model, method, method.scorer_for(model) or scorer) as trace:
        return trace, model(input_ids=ids, use_cache=True, **arguments)


@pytest.mark.parametrize(("name", "settings", "rule", "stages"), TABLE, ids=[line[0] for line in TABLE])
def test_a_method_keeps_the_tokens_of_its_papers_literal_rule(name, settings, rule, stages, model, ids):
    trace, _ = run(model, methods.get(name, **settings), ids)
    with torch.no_grad():
        kept, _ = literal(model, ids, rule() if isinstance(rule, type) else rule)
    assert tuple(sorted(trace.kept_positions)) == stages
    for layer in stages:
        assert trace.kept_positions[layer][0].tolist() == kept[layer].tolist(), f"before layer {layer}"
    assert len(kept[stages[-1]]) < TOKENS, "the rule dropped nothing, so nothing was tested"


@pytest.mark.parametrize(("threshold", "cut"), [(0.25, 4), (0.19, 6)])
def test_asl_cuts_where_ranks_have_settled_and_at_its_last_layer_in_any_case(threshold, cut, model, ids):
    trace, _ = run(model, methods.get("asl", threshold=threshold, layers_compared=3), ids)
    assert trace.tokens_per_layer == [TOKENS] * cut + [60] * (8 - cut)
    with torch.no_grad():
        kept, _ = literal(model, ids, Asl(threshold))
    assert trace.kept_positions[cut][0].tolist() == kept[cut].tolist()


def head_choice(weights, keys, scores_of, count, always):
    """Keys (G, K, d) that each key-value head keeps by ``scores_of(its heads' weights)``."""
    groups, shared = len(keys), len(weights) // len(keys)
    columns = [sorted(best(scores_of(weights[g * shared : (g + 1) * shared]), count, always)) for g in range(groups)]
    return torch.stack([keys[g][columns[g]] for g in range(groups)])


def by_window(window, kernel):
    def scores(weights):
        return [*summed(observed(weights, window, kernel)), *[0.0] * window]

    return scores


def accumulated(weights):
    return [float(weights[:, :, j].sum()) for j in range(weights.shape[-1])]


CACHES = [
    ("snapkv", {"tokens": 90}, lambda *_: None, by_window(32, 5), [90] * 8, lambda n: range(n - 32, n)),
    ("h2o", {}, lambda *_: None, accumulated, [60] * 8, lambda n: range(n - 30, n)),
    ("fastkv", {}, fastkv, by_window(8, 7), [30] * 8, lambda n: range(n - 8, n)),
]


@pytest.mark.parametrize(
    ("name", "settings", "rule", "scores_of", "counts", "always"), CACHES, ids=lambda v: str(v)[:9]
)
def test_each_head_of_each_layer_keeps_the_keys_of_the_literal_rule(
    name, settings, rule, scores_of, counts, always, model, ids
):
    trace, output = run(model, methods.get(name, **settings), ids)
    with torch.no_grad():
        _, layers = literal(model, ids, rule)
    for index, held in enumerate(cache_in(output).layers):
        weights, keys = layers[index]
        wanted = head_choice(weights, keys, scores_of, counts[index], set(always(keys.shape[1])))
        assert held.keys.shape[2] == counts[index]
        torch.testing.assert_close(held.keys[0], wanted, rtol=0, atol=1e-9)
    assert sum(trace.kv_bytes_per_layer) == sum(counts) * 2 * 2 * 8 * 8


def test_a_draft_chooses_by_what_its_look_ahead_tokens_attend_to(model, tiny_model, ids):
    draft = louder(tiny_model(seed=5, dtype=torch.float64, attn_implementation="eager", num_hidden_layers=2))
    trace, output = run(model, methods.get("specprefill", draft=draft, keep=0.3, chunk=16), ids)
    with torch.no_grad():
        longer = draft.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        attentions = draft(longer, output_attentions=True).attentions
        per_query = []
        for query in range(TOKENS, TOKENS + 8):
            heads = [head[query, :TOKENS] / head[query, :TOKENS].sum() for layer in attentions for head in layer[0]]
            heads = [pooled([float(v) for v in head], 13) for head in heads]
            per_query.append([max(each) for each in zip(*heads, strict=True)])
        kept = sorted(spec_chunks(per_query, TOKENS))
        assert trace.kept_positions[2][0].tolist() == kept
        plain = model(ids[:, kept], position_ids=torch.tensor([kept]))
    torch.testing.assert_close(output.logits, plain.logits, rtol=0, atol=1e-9)
    assert trace.tokens_per_layer == [len(kept)] * 8, "no layer of the large model reads the others"


def test_sdtp_is_the_papers_stages_and_takes_the_pruners_that_are_given(tiny_model):
    deep = tiny_model(num_hidden_layers=32)
    assert methods.get("sdtp").budget_for(deep).layers == (4, 7, 10, 13, 16, 19, 22, 25, 28, 31)
    assert methods.get("sdtp-low").budget_for(deep).layers == (4, 9, 14, 19, 24)
    recency = scorers.recency()
    assert methods.get("sdtp", pruners=recency).scorer_for(deep) is recency
    assert methods.get("sdtp").scorer_for(deep) is None, "token_pruning finds the model's own"


def test_the_earlier_scheme_pays_a_pruned_pass_and_then_all_layers_on_the_survivors(model, ids):
    trace, output = run(model, methods.get("earlier-scheme"), ids, scorers.recency())
    first = [300, 300, 300, 300, 270, 270, 270, 243]
    assert trace.tokens_per_layer == [count + 243 for count in first]
    chosen = torch.cat([ids[:, :4], ids[:, -239:]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(chosen).logits, rtol=0, atol=1e-9)
