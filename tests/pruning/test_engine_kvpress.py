"""SDTP and then a smaller KV cache (the paper's Table 6): heavy hitters (H2O) and SnapKV from kvpress.

kvpress needs transformers < 5.3, so these run in the environment of ``make test-floor``.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.evaluation.divergence import continuation_logits

kvpress = pytest.importorskip("kvpress", reason="kvpress needs transformers < 5.3: make test-floor")
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.randint(3, 128, (1, 100), generator=torch.Generator().manual_seed(6))
PRESSES = {
    "H2O": lambda: kvpress.ObservedAttentionPress(compression_ratio=0.6),
    "SnapKV": lambda: kvpress.SnapKVPress(compression_ratio=0.6, window_size=8),
}


def _run(model, press, config, steps=4):
    with torch.no_grad(), token_pruning(model, config, scorers.hidden_norm()) as trace:
        with press(model):
            out = model(input_ids=PROMPT, use_cache=True)
        cache, logits = cache_in(out), [out.logits[0, -1]]
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        for step in range(steps):
            place = torch.tensor([[PROMPT.shape[1] + step]])
            token = logits[-1].argmax().view(1, 1)
            out = model(input_ids=token, **cache_argument(model, cache), position_ids=place)
            logits.append(out.logits[0, -1])
    return trace, lengths, torch.stack(logits), cache


@pytest.mark.parametrize("name", PRESSES)
def test_a_compressed_cache_holds_forty_percent_of_the_kept_tokens_and_decodes(tiny_model, name):
    model = tiny_model(attn_implementation="eager" if name == "H2O" else "sdpa")
    trace, lengths, logits, cache = _run(model, PRESSES[name](), CONFIG)
    assert trace.tokens_per_layer == [100, 60, 60, 36, 21, 21]
    assert lengths == [int(tokens * 0.4) for tokens in trace.tokens_per_layer]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length + 4 for length in lengths]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", PRESSES)
def test_at_keep_ratio_one_the_press_alone_decides(tiny_model, name):
    model = tiny_model(attn_implementation="eager" if name == "H2O" else "sdpa")
    with torch.no_grad(), PRESSES[name]()(model):
        plain = model(input_ids=PROMPT, use_cache=True)
    trace, lengths, logits, _ = _run(model, PRESSES[name](), CONFIG.replace(keep_ratio=1.0), steps=0)
    assert trace.compression_ratio == 1.0
    assert lengths == [layer.keys.shape[-2] for layer in cache_in(plain).layers] == [40] * 6
    assert torch.equal(logits[0], plain.logits[0, -1])


def test_a_second_turn_on_a_compressed_cache_equals_single_steps(tiny_model):
    model, turn = tiny_model(dtype=torch.float64), torch.tensor([[7, 8, 9]])
    places = torch.arange(100, 103)[None]
    found = []
    for pieces in ((3,), (1, 1, 1)):
        _, _, _, cache = _run(model, PRESSES["SnapKV"](), CONFIG, steps=0)
        with torch.no_grad(), token_pruning(model, CONFIG, scorers.hidden_norm()):
            outputs = [
                model(input_ids=ids, **cache_argument(model, cache), position_ids=at).logits[0]
                for ids, at in zip(turn.split(pieces, 1), places.split(pieces, 1), strict=True)
            ]
        found.append(torch.cat(outputs))
    # Layers before the first cut get transformers' own mask, later ones ours; a first-layer trap would show here.
    torch.testing.assert_close(found[0][-1], found[1][-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.6])
def test_a_continuation_is_scored_at_its_own_positions_not_at_the_compressed_length(tiny_model, keep_ratio):
    """The cache says 40 tokens where the prompt had 100: positions taken from it gave a KL of 1.6 on running text."""
    model, config = tiny_model(dtype=torch.float64), CONFIG.replace(keep_ratio=keep_ratio)
    turn = [7, 8, 9]
    with PRESSES["SnapKV"]()(model):
        scored, _ = continuation_logits(model, PROMPT[0].tolist(), [*turn, 3], config, scorers.hidden_norm())
    _, _, first, cache = _run(model, PRESSES["SnapKV"](), config, steps=0)
    with torch.no_grad(), token_pruning(model, config, scorers.hidden_norm()):
        places = torch.arange(100, 103)[None]
        rest = model(torch.tensor([turn]), **cache_argument(model, cache), position_ids=places).logits[0]
    torch.testing.assert_close(scored, torch.cat([first, rest]).float(), rtol=0, atol=1e-6)


def test_compression_with_padding_is_refused(tiny_model):
    model = tiny_model()
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :60] = 0
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.hidden_norm()):
        with PRESSES["SnapKV"]()(model):
            cache = cache_in(model(input_ids=PROMPT.expand(2, -1), attention_mask=mask, use_cache=True))
        with pytest.raises(PruningNotSupported, match="KV-cache compression ran inside"):
            model(input_ids=PROMPT[:, :1].expand(2, -1), **cache_argument(model, cache))


def test_the_tables_command_measures_each_press_alone_and_behind_pruning(tiny_model, tiny_tokenizer, tmp_path, capsys):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "compression.py"
    main = runpy.run_path(str(path))["main"]
    folder = tmp_path / "model"
    tiny_model(max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    arguments = ["--model", str(folder), "--scorer", "recency", "--test-sets", "needle", "--samples", "2"]
    arguments += ["--prompt-tokens", "600", "--run-dir", str(tmp_path / "run")]
    main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "run" / "compression.jsonl").read_text().splitlines()]
    assert [row.get("error") for row in rows if row["kind"] == "failure"] == []
    assert len(rows) == 2 * 5 and "| keep09 | recency + SnapKV 40% |" in capsys.readouterr().out
    held = {(row["sample"], row["scorer"]): row["kv_bytes"] for row in rows}
    for (sample, name), kv in held.items():
        if name.startswith("recency + "):
            assert kv == pytest.approx(0.4 * held[sample, "recency"], rel=0.02)
            assert kv < held[sample, name.removeprefix("recency + ")]
    main(arguments)
    assert len((tmp_path / "run" / "compression.jsonl").read_text().splitlines()) == len(rows)
