"""The order of measurements: a run stopped at any moment is balanced over methods, test sets and tasks.

A step is one item at one speed-up, run by all methods one after the other. The first pass takes, at the first length
and the first speed-up, item after item of each KL test set and with each of them one item of RULER, task by task. Then
the other speed-ups, then the rest of RULER, then LongBench, then the other lengths. No model here.

With 3 test sets, tasks A, B, and 3 items: text 0, needle 0, instructions 0, A 0 - text 1, needle 1, instructions 1, B 0
- text 2, needle 2, instructions 2, A 1; what is left of A and B comes after the other speed-ups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtp_lib.data import longbench, ruler
from sdtp_lib.data.test_sets import samples_of
from sdtp_lib.evaluation.items import Item, longbench_items, ruler_items
from sdtp_lib.methods.variant import UNPRUNED

KL, RULER, LONGBENCH, TIME, MEMORY = "kl", "ruler", "longbench", "time", "memory"
KL_TEST_SETS = ("text", "needle", "instructions")
MEMORY_AT = 2  # the round after which peak memory is measured, once per speed-up and length
CHAT_TOKENS = 64


@dataclass(frozen=True)
class Step:
    """One item at one speed-up.

    Attributes
    ----------
    sort
        `KL`, `RULER`, `LONGBENCH`, `TIME` or `MEMORY`.
    test_set
        The test set, task or data set.
    length, number
        Prompt tokens; which item of the test set.
    speedup
        Wanted prefill speed-up by FLOPs.
    """

    sort: str
    test_set: str
    length: int
    number: int
    speedup: float


@dataclass(frozen=True)
class Sizes:
    """How many items to measure at one length: items per KL test set, per task of RULER, per data set of LongBench."""

    length: int
    items: int
    ruler_items: int
    longbench_items: int = 0


def steps(
    sizes: Sequence[Sizes],
    speedups: Sequence[float],
    *,
    test_sets: Sequence[str] = KL_TEST_SETS,
    tasks: Sequence[str] = ruler.TASKS,
    datasets: Sequence[str] = (),
) -> list[Step]:
    """All steps in the order in which they are measured."""
    found: list[Step] = []
    for size in sizes:
        later = []
        for speedup in speedups:
            early = 0
            for number in range(size.items):
                found += [Step(KL, test_set, size.length, number, speedup) for test_set in test_sets]
                if tasks and number < len(tasks) * size.ruler_items:
                    task = tasks[number % len(tasks)]
                    found.append(Step(RULER, task, size.length, number // len(tasks), speedup))
                    early += 1
                if number == min(MEMORY_AT, size.items - 1):
                    found.append(Step(MEMORY, MEMORY, size.length, 0, speedup))
            rest = range(early, len(tasks) * size.ruler_items)
            later += [Step(RULER, tasks[n % len(tasks)], size.length, n // len(tasks), speedup) for n in rest]
            later += [
                Step(LONGBENCH, name, size.length, number, speedup)
                for number in range(size.longbench_items)
                for name in datasets
            ]
        found += later
    return found


def name_of_sample(step: Step, item: Any) -> str:
    """What rows call the step's item; ``item`` is None for `TIME` and `MEMORY`."""
    if step.sort in (TIME, MEMORY):
        return f"random tokens {step.number}"
    return str(item["id"]) if step.sort == KL else item.identifier


def only_begun(tried: Mapping[str, int]) -> set[str]:
    """Methods tried on fewer than half of the items that the most measured one was tried on; ``tried``: on how many."""
    return {name for name, items in tried.items() if 2 * items < max(tried.values())}


class Measured:
    """What rows have been measured of: for a new method, or new pruners, on the same items as all others.

    An item counts where all methods of its length and speed-up have been tried on it, those aside that were tried on
    fewer than half of the most measured one's (`only_begun`).

    Parameters
    ----------
    methods
        Those that are to be measured; their own rows do not count.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], methods: Iterable[str] = ()) -> None:
        own, places = {UNPRUNED, *methods}, {}
        for row in rows:
            if row.get("sample") and row.get("method") not in own:  # measured, failed, or out of reach on this item
                place = (row["sort"], row["cell"], row["length"], row["sample"], row["speedup"])
                places.setdefault(place, set()).add(row["method"])
        counts: dict[tuple[int, float], Counter[str]] = {}
        for (_, _, length, _, speedup), tried in places.items():
            counts.setdefault((length, speedup), Counter()).update(tried)
        everyone = {at: of.keys() - only_begun(of) for at, of in counts.items()}
        self._places = {place for place, tried in places.items() if tried >= everyone[place[2], place[-1]]}

    def sizes(self, spare: int = 8) -> list[Sizes]:
        """As many items as the fullest test set, task and data set of each length has, and some for gaps between."""
        samples: dict[tuple[str, str, int], set[str]] = {}
        for sort, cell, length, sample, _ in self._places:
            samples.setdefault((sort, cell, length), set()).add(sample)

        def most(sort: str, length: int) -> int:
            counts = [len(found) for (own, _, at), found in samples.items() if (own, at) == (sort, length)]
            return max(counts) + spare if counts else 0

        lengths = sorted({length for _, _, length in samples})
        return [Sizes(n, most(KL, n), most(RULER, n), most(LONGBENCH, n)) for n in lengths]

    def speedups(self) -> list[float]:
        """In the order in which they are measured: 2x first."""
        return sorted({place[-1] for place in self._places}, key=lambda speedup: (speedup != 2.0, speedup))

    def cells(self, sort: str) -> list[str]:
        """The test sets, tasks or data sets that there are rows of."""
        return sorted({cell for own, cell, *_ in self._places if own == sort})

    def steps(self, items: Items) -> tuple[list[Step], int]:
        """The steps that there are rows of, and of how many rows' items there were none among ``items``."""
        planned = steps(self.sizes(), self.speedups(), test_sets=self.cells(KL), tasks=self.cells(RULER),
                        datasets=self.cells(LONGBENCH))  # fmt: skip
        found, seen = [], set()
        for step in planned:
            item = None if step.sort in (TIME, MEMORY) else items.of(step)
            if item is None and step.sort not in (TIME, MEMORY):
                continue
            place = (step.sort, step.test_set, step.length, name_of_sample(step, item), step.speedup)
            if place in self._places and place not in seen:
                found.append(step)
                seen.add(place)
        return found, len(self._places - seen)


def timing_steps(sizes: Sequence[Sizes], speedups: Sequence[float]) -> list[Step]:
    """For a model of random weights, whose quality says nothing: prefill time, cache and peak memory only."""
    return [
        step
        for size in sizes
        for speedup in speedups
        for step in (
            *(Step(TIME, TIME, size.length, number, speedup) for number in range(size.items)),
            Step(MEMORY, MEMORY, size.length, 0, speedup),
        )
    ]


class Items:
    """Makes the items of a plan, each test set once, when it is first needed.

    Parameters
    ----------
    sizes
        How many items of each sort to make, by length.
    texts
        Places of RULER's essays and questions (see `ruler_texts`).
    folder
        Of LongBench's files.
    """

    def __init__(
        self, tokenizer: Any, sizes: Sequence[Sizes], *, seed: int, texts: Sequence[str], folder: str | Path | None
    ) -> None:
        self._tokenizer, self._seed, self._texts, self._folder = tokenizer, seed, list(texts), folder
        self._sizes = {size.length: size for size in sizes}
        self._made: dict[tuple[str, str, int], list[Any]] = {}
        self.missing: dict[str, str] = {}  # test set -> why there are no or fewer items

    def of(self, step: Step) -> Any | None:
        """The step's item: a sample (`data`) or an `Item`; None where its data are not at hand."""
        key = (step.sort, step.test_set, step.length)
        if key not in self._made:
            make: Callable[[Step], list[Any]] = {KL: self._samples, RULER: self._ruler, LONGBENCH: self._longbench}[
                step.sort
            ]
            try:
                self._made[key] = make(step)
            except (OSError, ValueError) as error:
                self.missing[f"{step.test_set} at {step.length}"] = str(error)
                self._made[key] = []
        made = self._made[key]
        if step.number >= len(made):
            self.missing.setdefault(f"{step.test_set} at {step.length}", f"{len(made)} items are at hand")
            return None
        return made[step.number]

    def _samples(self, step: Step) -> list[Any]:
        count = self._sizes[step.length].items
        return samples_of(step.test_set, self._tokenizer, prompt_tokens=step.length, count=count, seed=self._seed)

    def _ruler(self, step: Step) -> list[Item]:
        count = self._sizes[step.length].ruler_items
        made = ruler.records(step.test_set, step.length, count, self._tokenizer, places=self._texts, seed=self._seed)
        return list(ruler_items(made, self._tokenizer))

    def _longbench(self, step: Step) -> list[Item]:
        if self._folder is None:
            raise OSError("no folder of LongBench's files was given (--longbench)")
        records = longbench.read_records(self._folder, step.test_set)[: self._sizes[step.length].longbench_items]
        most = step.length - longbench.task(step.test_set).max_new_tokens - CHAT_TOKENS
        return list(longbench_items(records, self._tokenizer, max_tokens=max(128, most)))
