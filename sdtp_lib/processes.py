"""An evaluation shared among processes: under `accelerate launch` each takes its share of the items, on its own device.

Every process appends to a row file of its own beside the run's one; they are joined before a run (what a killed one
left) and after it. Without a launcher there is one process, which writes the run's own file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from sdtp_lib.extras import extra
from sdtp_lib.records import RowWriter, join_rows

T = TypeVar("T")


class Share:
    """This process among those of one launch.

    Attributes
    ----------
    index, count
        Which of how many; 0 and 1 without a launcher.
    device
        Where its model belongs; None leaves the choice to `load_model`.
    """

    def __init__(self) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            with extra("train"):
                from accelerate import PartialState

            # More processes than GPUs: each GPU serves several, and what they wait for goes through the CPU.
            gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            self._state = PartialState(cpu=gpus < here)
        self.index: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1
        self.device: torch.device | None = self._state.device if self._state else None
        if self._state and 0 < gpus < here:
            self.device = torch.device("cuda", self._state.local_process_index % gpus)

    @property
    def is_first(self) -> bool:
        """Whether this process prints, and joins the rows."""
        return self.index == 0

    def of(self, items: Sequence[T]) -> list[T]:
        """Every ``count``-th of ``items``: neighbours, often of one length, go to different processes."""
        return list(items)[self.index :: self.count]

    def wait(self) -> None:
        """Until every process of the launch is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def rows(self, path: Path, provenance: Mapping[str, Any]) -> Iterator[RowWriter]:
        """This process's writer; rows of a run that was stopped count as done, by however many processes it ran.

        Raises
        ------
        RuntimeError
            If another run writes there.
        OtherProvenance
            If the rows there, or those of the run that was stopped, were made by another model, seed or setting.
        """
        own, beside = path, None
        if self.is_first:
            _gather(path, provenance)
        self.wait()
        if self.count > 1:
            own = path.with_name(f"{path.stem}.share{self.index}{path.suffix}")
            beside = path
        with RowWriter(own, provenance, beside=beside) as writer:
            yield writer
        self.wait()
        if self.is_first:
            _gather(path, provenance)
        self.wait()


def share_files(path: Path) -> list[Path]:
    """What several processes are writing, or a stopped run has left, of the rows that belong into ``path``."""
    return sorted(path.parent.glob(f"{path.stem}.share*{path.suffix}"))


def _gather(path: Path, provenance: Mapping[str, Any]) -> None:
    """Move the rows of all share files beside ``path`` into it; refused while a process still writes to one."""
    if shares := share_files(path):
        join_rows(path, shares, provenance)
