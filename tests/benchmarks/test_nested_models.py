"""Benchmarks on a model whose text part lies inside a multimodal one, with a configuration of its own."""

from __future__ import annotations

import pytest

from sdtp_lib.records import read_rows
from tests.benchmarks.commands import RUNS, command
from tests.evaluation.multimodal import multimodal_model


@pytest.fixture(scope="module")
def multimodal_folder(tiny_tokenizer, tmp_path_factory):
    """A model whose sizes stand in a configuration within its own."""
    model = multimodal_model()
    model.config.get_text_config().max_position_embeddings = 2048
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


NESTED = {
    "scorers": RUNS["scorers"],
    "labels": [*RUNS["labels"], "--presets", "keep09"],
    "schedules": RUNS["schedules"],
    "latency": RUNS["latency"],
    "latency memory": ["--lengths", "64"],
    "overhead scoring": ["--lengths", "64", "--repeats", "1"],
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_a_model_inside_a_multimodal_one_is_measured_as_any_other(multimodal_folder, tmp_path, name):
    """Its sizes were read off the outer configuration, which has none."""
    script_name, *rest = name.split()
    where = [] if script_name == "overhead" else ["--out" if script_name == "latency" else "--run-dir", str(tmp_path)]
    command(script_name)([*rest, *NESTED[name], "--model", str(multimodal_folder), *where])
    if where:
        (path,) = tmp_path.glob("*.jsonl")
        rows = read_rows(path)
        failed = [row["error"] for row in rows if row["kind"] == "failure"]
        assert len(rows) > len(failed) and all(error.startswith("PruningNotSupported: renum") for error in failed)
