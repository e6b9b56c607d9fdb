"""Work shared among processes, on the devices that there are."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from sdtp_lib.processes import Share


class _State:
    """accelerate's, as far as `Share` looks."""

    def __init__(self, cpu: bool) -> None:
        self.cpu, self.device = cpu, torch.device("cpu" if cpu else "cuda:1")
        self.process_index = self.local_process_index = 1
        self.num_processes = 3


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda:0"), (2, "cuda:1"), (3, "cuda:1")])
def test_processes_beyond_the_gpus_share_them(monkeypatch, gpus, device):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setitem(sys.modules, "accelerate", types.SimpleNamespace(PartialState=_State))
    share = Share()
    assert share.device == torch.device(device) and share.count == 3 and share.of([0, 1, 2, 3, 4]) == [1, 4]
    assert share._state.cpu == (gpus < 3), "processes of one GPU cannot wait for each other on it"


def test_one_process_leaves_the_device_to_the_loader(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (Share().device, Share().count, Share().is_first) == (None, 1, True)
