"""The explorer's two programs: which options `publish` keeps to, and what `app` says where it cannot serve."""

from __future__ import annotations

import json
import sys

import pytest

from sdtp_lib.explorer import app, page, publish
from sdtp_lib.explorer.export import view_payload
from sdtp_lib.explorer.state import ExplorerState
from tests.explorer.made_up import MadeUpSource


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project's root, far from the checkout."""
    monkeypatch.setattr(publish, "project_root", lambda: tmp_path / "root")
    monkeypatch.setattr(app, "project_root", lambda: tmp_path / "root")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def loaded(root, monkeypatch, tiny_model, tiny_tokenizer):
    """Names of models that were loaded; recording itself is quick."""
    names = []
    monkeypatch.setattr(publish, "load_model", lambda name: (names.append(name), (tiny_model(), tiny_tokenizer))[1])
    monkeypatch.setattr(publish, "answered_examples", lambda *_: {})
    monkeypatch.setattr(publish, "record", lambda _, made: {**view_payload(ExplorerState(MadeUpSource()), "view"),
                                                            "made": {"model": made["model"]}})  # fmt: skip
    return names


def test_a_page_is_made_of_the_options_that_its_runs_were_made_by_or_not_at_all(loaded, root, capsys):
    assert publish.main(["--model", "mine", "--prompt-tokens", "90"]) == 0
    first = (root / "docs" / "explorer.html").read_bytes()
    recorded = root / "data" / "results" / "explorer" / "recorded.json"
    assert json.loads(recorded.read_text())["options"] == {
        "model": "mine", "pruners": publish.PRUNERS, "prompt_tokens": 90,
    }  # fmt: skip
    for same in ([], ["--model", "mine"], ["--prompt-tokens", "90", "--pruners", publish.PRUNERS]):
        assert publish.main(same) == 0
    assert loaded == ["mine"] and (root / "docs" / "explorer.html").read_bytes() == first
    capsys.readouterr()
    assert publish.main(["--model", "./no-such-model", "--prompt-tokens", "5", "--pruners", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and loaded == ["mine"]
    assert f"recorded with --model mine --pruners {publish.PRUNERS} --prompt-tokens 90, not --model ./no-such" in said
    assert "give --again" in said
    assert publish.main(["--model", "other", "--again"]) == 0 and loaded == ["mine", "other"]
    assert json.loads(recorded.read_text())["options"]["model"] == "other"


def test_runs_kept_before_their_options_were_are_good_for_the_default_ones(loaded, root, capsys):
    assert publish.main([]) == 0
    recorded = root / "data" / "results" / "explorer" / "recorded.json"
    old = json.loads(recorded.read_text())
    del old["options"]
    recorded.write_text(json.dumps(old))
    assert publish.main(["--model", "embedded", "--prompt-tokens", "600"]) == 0
    assert publish.main(["--prompt-tokens", "5"]) == 2
    assert "--prompt-tokens 600, not --prompt-tokens 5" in capsys.readouterr().err


def test_the_page_holds_no_option_of_the_command(loaded, root):
    assert publish.main([]) == 0
    kept = json.loads((root / "data" / "results" / "explorer" / "recorded.json").read_text())
    del kept["options"]
    assert (root / "docs" / "explorer.html").read_text() == page.live_page(kept)


def test_a_page_may_lie_anywhere(loaded, root, tmp_path, capsys):
    assert publish.main(["--out", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{tmp_path / 'x.html'}: ")
    assert (tmp_path / "x.html").read_text().startswith("<!")


def test_pruners_that_are_not_there_are_refused_before_a_model_is_loaded(loaded, root, capsys):
    assert publish.main(["--pruners", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: --pruners nonsense: neither a folder of pruners") and not loaded


def test_the_app_of_an_installed_wheel_says_that_it_needs_the_checkout(root, capsys):
    assert app.main([]) == 2
    said = capsys.readouterr().err
    assert said == "error: app/explore.ipynb is not here: the sliders need the checkout (make app).\n"


def test_the_app_without_voila_names_the_extra_that_brings_it(root, capsys, monkeypatch):
    (root / "app").mkdir()
    (root / "app" / "explore.ipynb").write_text("{}")
    monkeypatch.setitem(sys.modules, "voila", None)
    monkeypatch.delitem(sys.modules, "voila.app", raising=False)
    assert app.main([]) == 2
    assert capsys.readouterr().err.endswith(" is not installed: pip install 'sdtp-lib[study]'\n")
