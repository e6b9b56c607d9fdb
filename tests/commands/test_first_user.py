"""A first-time user's whole way, as typed: a model of one's own, a file of 40 lines, train, compare, generate."""

from __future__ import annotations

import json
import re

import pytest

from sdtp_lib.__main__ import main


@pytest.mark.slow
def test_train_compare_and_generate_with_a_model_and_a_file_of_ones_own(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDTP_PRUNERS", str(tmp_path / "pruners"))
    tiny_model(max_position_embeddings=2048).save_pretrained("my-model")
    tiny_tokenizer.save_pretrained("my-model")
    context = "the rain in the plain stays on the mainland, it is said. " * 4
    records = [
        {"instruction": f"what is said of rain {n}?", "context": f"rain {n}: {context}", "response": f"{n} times"}
        for n in range(40)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "asked.jsonl").write_text(json.dumps(records[0]) + "\n" + json.dumps(records[1]))

    def typed(line: str) -> str:
        assert main(line.split()) == 0
        return capsys.readouterr().out

    typed(
        "train my-model --data mine.jsonl --instructions embedded --prompts 40 --prompt-tokens 900 1000 "
        "--most-tokens 1000 --epochs 1 --heldout 0 --layers 2 4"
    )
    (made,) = (tmp_path / "pruners").iterdir()
    assert f"{made.name}  (yours: " in typed("pruners my-model")
    table = typed("compare my-model asked.jsonl --budget 1.3x --new-tokens 3 --repeats 1")
    assert re.search(rf"^\| {made.name} \| [\d.]+ \| \d of 2 \|", table, re.M)
    answers = typed("generate my-model asked.jsonl --budget 1.3x --new-tokens 3")
    assert len(re.findall(r"^-- prompt: .*scorer: learned$", answers, re.M)) == 2
