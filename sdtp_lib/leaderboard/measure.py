"""One item, unpruned once and then by every method in turn: rows of divergence or answers, times, cache and memory.

The clock runs from entering ``with token_pruning`` to the first token, so that scoring counts. Methods take turns from
item to item. Beside its own time a row has the unpruned one where that was taken in the same turn. Knows no table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sdtp_lib import budget
from sdtp_lib.architectures.caches import kv_bytes
from sdtp_lib.evaluation.compare import add_rows, on_sample, sample_hash
from sdtp_lib.evaluation.items import Item
from sdtp_lib.latency.generation import end_tokens, plain_prefill, plain_step
from sdtp_lib.latency.measure import Stopwatch
from sdtp_lib.latency.run import peak_of_prefill, prompt_ids
from sdtp_lib.leaderboard.entrants import out_of_reach, settings
from sdtp_lib.leaderboard.plan import KL, MEMORY, TIME, Step, name_of_sample
from sdtp_lib.methods.variant import UNPRUNED, Variant
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.stage import name_of
from sdtp_lib.records import RowWriter, content_id

# Beyond the answer's own tokens: a word before it, and numbers of a list.
_SPARE_TOKENS = 8


class Measurement:
    """Rows of a run; what an earlier one left counts as done.

    Parameters
    ----------
    rows
        The rows that ``writer``'s file has already: where the unpruned answer to an item is known, it is not asked for
        again.
    left_out
        Methods that this model cannot have, and why: a row per length and speed-up says so.
    times
        Whether rows tell the prefill's time; without, several processes may share a device.
    elsewhere
        Rows of another device: a method is not run on what one of them has, made from the same sample.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        entrants: Sequence[Variant],
        writer: RowWriter,
        rows: Sequence[Mapping],
        *,
        left_out: Mapping[str, str] | None = None,
        times: bool = True,
        elsewhere: Sequence[Mapping] = (),
    ) -> None:
        self._left_out, self._times = dict(left_out or {}), times
        self._warm: set[tuple[str, float, int]] = set()
        self._model, self._tokenizer, self._entrants, self._writer = model, tokenizer, list(entrants), writer
        self._shape = ModelShape.from_model(model)
        self._scorers = writer.scored_by({UNPRUNED: None} | {each.name: each.scorer for each in entrants})
        self._unpruned = {row["key"]: row for row in rows if row.get("method") == UNPRUNED and row["kind"] != "failure"}
        self._reach: dict[tuple[str, float, int], str] = {}
        self._elsewhere = {
            (row["key"], row.get("sample_hash"), row.get("config_hash")) for row in elsewhere if row["kind"] == "item"
        }

    def run(self, step: Step, item: Any) -> None:
        """The rows of a step that the file does not have yet; ``item`` is None for `TIME` and `MEMORY`."""
        if step.sort == KL:
            prompt, made_from = item["prompt_ids"], {"sample_hash": sample_hash(item)}
        elif step.sort in (TIME, MEMORY):
            prompt = prompt_ids(self._shape.vocab_size, step.length, step.number)[0].tolist()
            made_from = {"sample_hash": content_id(prompt)}
        else:
            prompt = item.prompt_ids
            made_from = {"sample_hash": content_id(prompt, self._most_new_tokens(item))}
        name = name_of_sample(step, item)
        head = f"{step.sort} {step.test_set}@{step.length}|{name}"
        labels = {"sort": step.sort, "cell": step.test_set, "length": step.length, "sample": name}
        labels |= {"prompt_tokens": len(prompt)} | made_from
        for method, why in self._left_out.items():
            self._out_of_reach(method, step, why, None)
        todo = []
        for each in self._entrants:
            key = f"{head}|{step.speedup:g}|{each.name}"
            if (key, made_from["sample_hash"], settings(each)) in self._elsewhere or not self._reaches(each, step):
                continue
            if not self._writer.done(key, **made_from, config_hash=settings(each)):
                todo.append((key, each))
        unpruned_key = f"{head}|1|{UNPRUNED}"
        known = (unpruned_key, made_from["sample_hash"], None) in self._elsewhere
        if not todo and (known or self._writer.done(unpruned_key, **made_from)):
            return
        full, beside = self._run_unpruned(step, item, prompt, unpruned_key, labels)
        if full is None:
            return

        def measure(each: Variant) -> dict[str, Any]:
            variant = each.at(self._model, f"{step.speedup}x", len(prompt))
            return self._measured(step, item, prompt, full, variant) | beside

        # A method's place in the turn changes with the item, so that none always runs when the machine is warmest.
        turn = step.number % len(todo) if todo else 0
        rows = []
        for key, each in todo[turn:] + todo[:turn]:
            own = labels | {"method": each.name, "speedup": step.speedup, "scorer": name_of(each.scorer)}
            own |= {"scorer_id": self._scorers[each.name], "config_hash": settings(each)}
            own |= {"remark": remark} if (remark := getattr(each.budget, "remark", "")) else {}
            rows.append((key, own, functools.partial(measure, each)))
        add_rows(self._writer, rows, kind="item")

    def _reaches(self, each: Variant, step: Step) -> bool:
        """Whether the method can reach the speed-up at this length; if not, one row says so."""
        place = (each.name, step.speedup, step.length)
        if place not in self._reach:
            self._reach[place] = why = out_of_reach(each, self._model, step.speedup, step.length)
            if why:
                self._out_of_reach(each.name, step, why, self._scorers[each.name])
        return not self._reach[place]

    def _out_of_reach(self, method: str, step: Step, why: str, scorer: str | None) -> None:
        key = f"reach@{step.length}|{step.speedup:g}|{method}"
        if not self._writer.done(key):
            self._writer.add(
                key, kind="out of reach", method=method, scorer_id=scorer, length=step.length, speedup=step.speedup,
                error=why[:300],
            )  # fmt: skip

    def _run_unpruned(self, step: Step, item: Any, prompt: Sequence[int], key: str, labels: Mapping[str, Any]) -> Any:
        """The unpruned run that pruned ones are compared with, and the fields of it that their rows repeat."""
        known = self._unpruned.get(key)
        if known is not None and step.sort not in (KL, TIME):
            return known, {name: value for name, value in _beside(known).items() if name != "unpruned_prefill_ms"}
        try:
            fields = self._measured(step, item, prompt, None, Variant(UNPRUNED))
        except (RuntimeError, ValueError, MemoryError) as error:
            if not self._writer.done(key):
                own = {"method": UNPRUNED, "speedup": 1.0, "scorer_id": None}
                reason = f"{type(error).__name__}: {str(error)[:300]}"
                self._writer.add(key, kind="failure", **labels, **own, error=reason)
            return None, {}
        full = fields.pop("logits", fields)
        if known is None:
            own = {"method": UNPRUNED, "speedup": 1.0, "scorer_id": None}
            self._unpruned[key] = self._writer.add(key, kind="item", **labels, **own, **fields)
        return full, _beside(fields)

    def _measured(self, step: Step, item: Any, prompt: Sequence[int], full: Any, variant: Variant) -> dict[str, Any]:
        """The measured fields of one run; with ``logits`` where it is the unpruned one of a KL test set."""
        if step.sort == MEMORY:
            ids = torch.tensor([list(prompt)], device=self._model.device)
            return {"peak_bytes": peak_of_prefill(self._model, variant, ids)}
        if step.sort == KL:
            found, logits, trace = on_sample(self._model, item, variant, full, Stopwatch(self._model.device))
            found |= {"logits": logits} if full is None else {}
        elif step.sort == TIME:
            if (place := (variant.name, step.speedup, step.length)) not in self._warm:
                self._generated(prompt, variant, most=1)  # a GPU chooses and compiles kernels at first sight of a shape
                self._warm.add(place)
            found, trace = self._generated(prompt, variant, most=1)
            del found["new_ids"]
        else:
            found, trace = self._answered(item, variant)
        if not self._times:
            found.pop("prefill_ms", None)
        if trace is not None:
            whole = budget.prefill_flops(self._shape, [len(prompt)] * self._shape.num_layers)
            found["flops_speedup"] = whole / variant.flops(self._model, len(prompt), trace.tokens_per_layer)
            found["compression_ratio"] = trace.compression_ratio
        return found

    def _answered(self, item: Item, variant: Variant) -> tuple[dict[str, Any], Any]:
        def right(new_ids: list[int]) -> bool:
            # RULER asks whether the answers are in the text: what follows them cannot make it worse.
            return "answers" in item.labels and item.score(self._text(new_ids)) >= 1.0

        most = self._most_new_tokens(item)
        found, trace = self._generated(item.prompt_ids, variant, most=most, stop=item.stop_ids, right=right)
        text = self._text(found.pop("new_ids"))
        labels = {name: item.labels[name] for name in ("answer_depth", "text_source") if name in item.labels}
        return found | labels | {"prediction": text, "score": item.score(text)}, trace

    def _generated(
        self, prompt: Sequence[int], variant: Variant, *, most: int, stop: Sequence[int] = (), right: Any = None
    ) -> tuple[dict[str, Any], Any]:
        """Greedy decoding up to ``most`` tokens, an end token, or the right answer (``right`` says so)."""
        ends = {*end_tokens(self._model), *stop}
        ids = torch.tensor([list(prompt)], device=self._model.device)
        watch = Stopwatch(ids.device)
        with torch.inference_mode(), variant.applied(self._model) as trace:
            logits, cache = plain_prefill(self._model, ids)
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            watch.mark("prefill")
            held, new_ids = sum(kv_bytes(cache)), [int(token)]
            while len(new_ids) < most and new_ids[-1] not in ends and not (right and right(new_ids)):
                logits, cache = plain_step(self._model, token, cache)
                token = logits[:, -1].argmax(dim=-1, keepdim=True)
                new_ids.append(int(token))
        return {"prefill_ms": watch.parts_ms()["prefill"], "kv_bytes": held, "new_ids": new_ids}, trace

    def _most_new_tokens(self, item: Item) -> int:
        """RULER's answers are given room for themselves and half as much again; others their official number."""
        if "answers" not in item.labels:
            return item.max_new_tokens
        answer = self._tokenizer(" ".join(item.labels["answers"]), add_special_tokens=False)["input_ids"]
        return min(item.max_new_tokens, math.ceil(1.5 * len(answer)) + _SPARE_TOKENS)

    def _text(self, new_ids: list[int]) -> str:
        return self._tokenizer.decode(new_ids, skip_special_tokens=True)


def _beside(unpruned: Mapping[str, Any]) -> dict[str, Any]:
    names = ("prefill_ms", "kv_bytes", "peak_bytes", "score")
    return {f"unpruned_{name}": unpruned[name] for name in names if unpruned.get(name) is not None}
