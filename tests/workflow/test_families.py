"""The sweep: a dozen families asked everything, and that each kind of answer is recognised for what it is."""

from __future__ import annotations

import json
import time

import families
import family_checks
import family_models
import family_report
import family_subject
import pytest
import torch
from family_checks import CHECKS, ENGINE
from family_labels import LABEL_NAMES
from family_subject import ERROR, REFUSED, RIGHT, UNASKED, UNPROVEN, WRONG, Subject, judged

from sdtp_lib import PruningNotSupported

# One of each kind: windows in some, all and no layers, alibi, learned positions, parallel blocks, experts, sinks, fused
# projections, sandwich norms.
ASKED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "olmo2", "gpt2", "gpt_neox", "opt", "bloom",
         "qwen3_moe", "smollm3", "cohere")  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    cache = {}

    def get(family, backend):
        if (family, backend) not in cache:
            cache.clear()
            cache[family, backend] = Subject(family_models.tiny_model(family, backend))
        return cache[family, backend]

    return get


@pytest.mark.parametrize("check", ENGINE)
@pytest.mark.parametrize("family", ASKED)
def test_pruned_is_masked(subject, family, check):
    result = judged(CHECKS[check], subject(family, family_models.default_backend(family)))
    assert result.outcome in (RIGHT, UNASKED), result


@pytest.mark.parametrize("check", ("attention", *LABEL_NAMES, "flops"))
@pytest.mark.parametrize("family", ASKED)
def test_scores_labels_and_counts_are_right_or_refused(subject, family, check):
    result = judged(CHECKS[check], subject(family, "eager"))
    assert result.outcome in (RIGHT, REFUSED), result


# --- the checks can fail


def _leaky(family="llama"):
    model = family_models.tiny_model(family, "sdpa")
    for layer in family_subject.find_layers(model):
        layer.register_forward_hook(lambda _l, _a, output: output + output.cumsum(1) / output.shape[1])
    return Subject(model)


@pytest.mark.parametrize("check", ("prefill", "decode"))
def test_tokens_mixed_outside_attention_are_silently_wrong(check):
    result = judged(CHECKS[check], _leaky())
    assert result.outcome in (WRONG, UNASKED) and (check == "decode" or result.outcome == WRONG)


def test_a_model_that_is_not_pruned_and_says_nothing_is_silently_wrong(subject, monkeypatch):
    import contextlib
    import types

    nothing = types.SimpleNamespace(kept_positions={}, prefills=0)
    monkeypatch.setattr(family_checks, "token_pruning", lambda *_: contextlib.nullcontext(nothing))
    plain = subject("llama", "sdpa")
    assert judged(CHECKS["prefill"], plain).outcome == WRONG
    assert judged(CHECKS["exact"], plain).outcome == WRONG


def test_layers_that_read_no_mask_are_not_proven():
    model = family_models.tiny_model("llama", "sdpa")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, forward=forward, **k: forward(*a, **{**k, "attention_mask": None})
    assert judged(lambda s: s.reference_holds, Subject(model)).outcome == UNPROVEN


def raising(error):
    def check(_subject):
        raise error

    return check


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (PruningNotSupported("no"), REFUSED),
        (TypeError("size of tensor a"), ERROR),
        (ValueError("not raised by the library"), ERROR),
        (family_subject.Wrong("off"), WRONG),
        (family_subject.NoReference("no mask"), UNPROVEN),
        (family_subject.Inconsistent("the plain model"), UNASKED),
    ],
    ids=lambda value: str(value),
)
def test_outcomes_are_told_apart(error, outcome):
    assert judged(raising(error), None).outcome == outcome


def test_a_value_error_of_the_library_is_a_refusal():
    from sdtp_lib import PruningConfig

    assert judged(lambda _s: PruningConfig(layers=()), None).outcome == REFUSED


# --- the command


def test_a_family_that_hangs_is_cut_off_and_the_sweep_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "LIMIT_S", 1)
    real = families.ask

    def ask(family, *rest):
        if family == "gpt2":
            time.sleep(60)
        real(family, *rest)

    monkeypatch.setattr(families, "ask", ask)
    monkeypatch.setitem(CHECKS, "exact", lambda _s: 0.0)
    about, file = {"engine": {"transformers": "0", "group": "engine", "code": "x"}}, tmp_path / "rows.jsonl"
    part = [("sdpa", "engine")]
    families.run({"gpt2": part, "llama": part}, ["exact"], file, about, jobs=1)
    ends = {row["family"]: row["outcome"] for row in families.rows_of(file, about, "end")}
    assert ends["gpt2"] == ERROR
    assert set(ends) == {"gpt2", "llama"}


def test_rows_of_other_code_and_half_a_line_are_left_out(tmp_path):
    file, row = tmp_path / "rows.jsonl", {"group": "engine", "code": "b", "check": "end"}
    families.append(file, {**row, "code": "a"})
    families.append(file, {**row, "group": "labels"})
    families.append(file, row)
    with file.open("a") as rows:
        rows.write('{"group": "engine", "code": "b", "che')
    assert families.rows_of(file, {"engine": {"group": "engine", "code": "b"}}) == [row]


def test_a_change_of_the_labels_asks_only_for_labels_again(tmp_path, monkeypatch):
    before = {group: families.code_of(group) for group in families.REACHED}
    for pattern in sorted({pattern for some in families.REACHED.values() for pattern in some}):
        for file in families.project_root().glob(f"{pattern}.py"):
            copy = tmp_path / file.relative_to(families.project_root())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    monkeypatch.setattr(families, "project_root", lambda: tmp_path)
    assert {group: families.code_of(group) for group in families.REACHED} == before
    (tmp_path / "sdtp_lib/training/labels.py").write_text("other = True")
    assert [group for group in before if families.code_of(group) != before[group]] == ["labels"]


def row(family, check, outcome, backend="sdpa", **more):
    versions = {"transformers": "5.23.0", "torch": "2.13.0"}
    return {"family": family, "backend": backend, "check": check, "outcome": outcome, "detail": "", **versions, **more}


def built(family, kind, **more):
    return row(family, "build", RIGHT, model_type=kind, **{"class": f"{kind}LM"}, **more)


def test_a_family_is_what_its_worst_row_makes_of_it():
    right = [row("a", check, RIGHT) for check in ENGINE]
    rows = [*right, row("a:alibi", "prefill", WRONG), row("b", "entry", REFUSED)]
    rows += [row("c", check, RIGHT) for check in ENGINE] + [row("c", "removal", REFUSED)]
    report = family_report.Report([*rows, row("d", "decode", ERROR, detail="TypeError")])
    assert report.state == {"a": WRONG, "b": REFUSED, "c": "works", "d": ERROR}
    assert report.summary().endswith("4 families: 1 works, 1 refused, 1 silently wrong, 1 raw error")
    assert "raw error: d, sdpa, decode: TypeError" in report.summary()


def test_only_what_was_right_in_every_variant_is_trusted():
    rows = []
    for family, bad in (("a", None), ("a:alibi", "padded"), ("b", None), ("c", "second turn")):
        rows.append(built(family, family.split(":")[0]))
        rows += [row(family, check, REFUSED if check == bad else RIGHT) for check in ENGINE]
    rows += [built("b", "b", backend="eager"), *(row("b", check, RIGHT, backend="eager") for check in ENGINE[:3])]
    report = family_report.Report([*rows, row("b", "padded", UNASKED, backend="eager")])
    assert report.trusted() == {"b bLM": ["eager", "sdpa"]}


SWEPT = {"5.23": {"transformers": "5.23.0", "torch": "2.13.0", **dict.fromkeys(family_report.STATES, 1)}}


def test_the_matrix_has_a_line_for_each_family_in_words_and_names_each_reason_once():
    rows = [built("a", "a"), *(row("a", check, RIGHT) for check in ENGINE)]
    rows += [
        row(f, "entry", REFUSED, detail=f"{f.upper()}xForCausalLM: multimodal | no: use another") for f in ("b", "c")
    ]
    rows += [row(f, "flops", REFUSED, detail=f"ValueError: {f} layer 0 (Layer): no count") for f in ("a", "b")]
    page = family_report.Report(rows).matrix(SWEPT)
    assert "| a | **works** (sdpa) | - | - | refused (1) |" in page
    assert "| b | refused: multimodal \\| no | - | - | refused (1) |" in page
    assert page.count("no count") == 1 and "| 5.23.0 | 2.13.0 | 1 |" in page


def test_readme_names_the_known_families_and_the_counts_of_each_version():
    rows = [built("llama", "llama"), *(row("llama", check, RIGHT) for check in ENGINE), row("mamba", "entry", REFUSED)]
    block = family_report.Report(rows).table(SWEPT)
    assert "works: llama; refused: mamba" in block.note and block.body[0][:3] == ("5.23.0", "2.13.0", "1")


@pytest.mark.parametrize("newest", (True, False))
def test_a_sweep_of_an_older_version_adds_its_list_and_leaves_the_page(tmp_path, monkeypatch, newest):
    monkeypatch.setattr(family_report, "project_root", lambda: tmp_path)
    monkeypatch.setattr(family_report.tables, "main", lambda _: 0)
    shipped, other = tmp_path / family_report.SUPPORTED, "5.3" if newest else "5.100"
    shipped.parent.mkdir(parents=True)
    shipped.write_text(json.dumps({"works": {other: {}}, "swept": {other: SWEPT["5.23"]}}))
    (tmp_path / "figures").mkdir()
    family_report.Report([built("a", "a"), *(row("a", check, RIGHT) for check in ENGINE)]).write()
    works = json.loads(shipped.read_text())["works"]
    assert works["5.23"] == {"a aLM": ["sdpa"]} and list(works) == (["5.3", "5.23"] if newest else ["5.23", "5.100"])
    assert (tmp_path / family_report.MATRIX).exists() == newest


def test_tiny_models_are_the_same_each_time_and_small():
    first, second = (family_models.tiny_model("llama", "sdpa") for _ in range(2))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert family_models.parameter_count("llama", "sdpa") == sum(p.numel() for p in first.parameters()) < 1e6


def test_every_name_of_the_mapping_is_asked_and_windows_both_ways():
    names = family_models.families()
    assert {"llama", "falcon:alibi", "mistral:full", "phi3:window"} <= set(names)
    assert len(set(names)) == len(names) > 180
    assert json.loads((families.project_root() / family_report.SUPPORTED).read_text())["works"]
