"""Peak memory and energy of what runs between the start and the end of a watch, where the system counts them.

CUDA: its allocator, and NVML's energy counter. A CPU: the resident set, torch's own allocations, and RAPL. Knows
nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_MB = 1e6


class MemoryWatch:
    """Peak memory between its making and `read_mb`: CUDA's allocator, or this process's resident set on Linux."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            with contextlib.suppress(OSError):
                # Sets the peak resident set back to the present one (Linux, man proc_pid_clear_refs).
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident_bytes("VmRSS")

    def read_mb(self) -> dict[str, float | None]:
        """``peak_memory_mb`` and what of it was not there at the beginning, ``memory_growth_mb`` (10^6 bytes)."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _resident_bytes("VmHWM")
        if peak is None or self._before is None:
            return {"peak_memory_mb": None, "memory_growth_mb": None}
        return {"peak_memory_mb": peak / _MB, "memory_growth_mb": max(0, peak - self._before) / _MB}


def _resident_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


def peak_allocated_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors that ``call`` had allocated at once, beyond those that were there before.

    On a CPU read from torch's allocator through its profiler, which slows the call down: never inside a timed run. The
    resident set hides small allocations and keeps freed ones; this count does neither.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # else what an earlier call left in circles is freed in this one, and counts against it
    watched = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
    with _quiet_profiler(), torch.profiler.profile(**watched) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    present = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        present += event.nbytes()
        peak = max(peak, present)
    return peak


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """No "profiler_start" and "_stop" on standard error at each call; the environment is as before behind it."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


class EnergyWatch:
    """Joules between its making and `read_joules`, where the device counts them: NVML, or RAPL on a host."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._read = _nvml_joules(torch.device(device)) if torch.device(device).type == "cuda" else _rapl_joules()
        self._before = self._read() if self._read else None

    def read_joules(self) -> float | None:
        """Energy so far, or None where nothing counts it (or the counter ran over)."""
        if self._read is None or self._before is None:
            return None
        used = self._read() - self._before
        return used if used >= 0 else None


def _nvml_joules(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no NVML, an old card, a container without it: energy is then not known, and nothing else fails
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _rapl_joules() -> Callable[[], float] | None:
    counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"))
    try:
        for counter in counters:
            counter.read_text()
    except OSError:
        return None
    return (lambda: sum(int(counter.read_text()) for counter in counters) / 1e6) if counters else None
