"""Which prompts a run trains on and is measured on, the library's own and the user's; printed before any compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.data import training_mix
from sdtp_lib.data.evidence import evidence_prompts
from sdtp_lib.data.own_records import own_samples
from sdtp_lib.data.samples import dolly_split, stable_number


def choose_prompts(
    tokenizer: Any,
    data: str | Path | Iterable[Mapping[str, Any]] | None,
    instructions: str,
    prompts: int,
    lengths: tuple[int, int],
    most_tokens: int,
    heldout: int,
    seed: int,
    say: Any,
    evidence: float = 0.0,
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]], list[str]]:
    """(training prompts, kind -> held-out prompts, what was printed), before a model is loaded.

    A user's prompts make up half at most; two in ten of them are held out. ``say`` prints. ``evidence`` times as many
    of `data.evidence` come after the others.
    """
    records, source = training_mix.instruction_records(instructions)
    own, own_held, told = [], [], [f"instructions: {source}"]
    if data is not None:
        fillers = [record["context"] for record in records if dolly_split(record["id"]) == "train"]
        found = own_samples(data, tokenizer, fillers=fillers, tokens=lengths, most_tokens=most_tokens, seed=seed)
        told.append(f"yours: {found}")
        order = sorted(found.samples, key=lambda sample: stable_number("own-order", seed, sample["id"]))
        own_held = [sample for sample in order if dolly_split(sample["id"]) == "heldout"]
        own = [sample for sample in order if dolly_split(sample["id"]) == "train"] or order
        own = own[: max(1, prompts // 2)]
    mixed = training_mix.training_mix(tokenizer, prompts - len(own), records, lengths=lengths, seed=seed)
    train = interleaved(own, mixed)
    known = evidence_prompts(
        tokenizer, round(evidence * len(train)), records, lengths=(min(300, lengths[0]), lengths[1]), seed=seed
    )
    if known:
        told.append(f"{len(known)} more prompts whose evidence is known by how they are made")
    train += known
    held_out = {
        kind: training_mix.samples_of(kind, tokenizer, heldout, records, "heldout", _upper(lengths), seed + 100)
        for kind in (training_mix.KINDS if heldout else ())
    }
    if own_held and heldout:
        held_out["own"] = own_held[:heldout]
    for line in told:
        say(line)
    say(f"{len(train)} prompts to train on: {listed(Counter(sample['category'] for sample in train))}", flush=True)
    return train, held_out, told


def listed(values: Mapping[str, Any]) -> str:
    """Names with their values as a person reads them: ``text 4, needle 2``."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def _upper(lengths: tuple[int, int]) -> tuple[int, int]:
    """The longer half of the lengths: where pruning is for, and where it is measured."""
    return round((lengths[0] * lengths[1]) ** 0.5), lengths[1]


def interleaved(*lists: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lists spread over one, so that any beginning of it has the mix."""
    places = [((index + 0.5) / len(some), number, sample)
              for number, some in enumerate(lists) for index, sample in enumerate(some)]  # fmt: skip
    return [sample for *_, sample in sorted(places, key=lambda place: place[:2])]
