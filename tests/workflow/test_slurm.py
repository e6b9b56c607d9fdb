"""A sweep on a real single-node SLURM (Debian's slurm-wlm and munge), started on loopback here and stopped after.

Jobs fail on purpose, the node is drained and resumed, the controller is killed and restarted, the study itself is
killed: nothing is lost, and nothing that was done runs twice. Apart from CI: `make test-slurm`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from sdtp_lib.records import read_rows

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
SYSTEM_CONF = Path("/etc/slurm/slurm.conf")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """munged, slurmctld and slurmd of this test, with every file in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.studies: list[subprocess.Popen] = []
        self.host = socket.gethostname().partition(".")[0]
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={self.host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
MinJobAge=300
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={self.host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=2000 State=UNKNOWN
PartitionName=test Nodes={self.host} Default=YES MaxTime=60 State=UP
"""
        )
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self, name: str) -> None:
        command = {
            "munged": ["munged", "-F", "--force", f"--key-file={self.folder}/munge.key",
                       f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid",
                       f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"],
            "slurmctld": ["slurmctld", "-D"],
            "slurmd": ["slurmd", "-D", "-N", self.host],
        }[name]  # fmt: skip
        with (self.folder / f"{name}.out").open("a") as output:
            self.processes[name] = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)

    def ask(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        ).stdout

    def until(self, what: str, true, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, (
                f"not within {seconds} s: {what}\n{self.ask('sinfo')}\n{self.ask('squeue')}"
            )
            time.sleep(0.25)

    def node_state(self) -> str:
        return self.ask("sinfo", "--noheader", "--format=%T").strip()

    def running(self) -> int:
        return len(self.ask("squeue", "--noheader", "--states=running", "--format=%i").split())

    def queued(self) -> int:
        return len(self.ask("squeue", "--noheader", "--format=%i").split())

    def stop(self) -> None:
        for study in self.studies:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(study.pid, signal.SIGKILL)
            study.wait()
        self.ask("scancel", "--user=root")
        with contextlib.suppress(AssertionError):
            self.until("an empty queue", lambda: self.queued() == 0, 30)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


@pytest.fixture(scope="module")
def cluster():
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Debian's slurm-wlm and munge; missing: {missing or 'root'}")
    if SYSTEM_CONF.exists() or SYSTEM_CONF.is_symlink():
        pytest.skip(f"{SYSTEM_CONF} is there: this machine has a SLURM of its own")
    # A short path that others can pass through: munged refuses sockets below folders that it cannot trust.
    folder = Path(tempfile.mkdtemp(prefix="sdtp-slurm-", dir="/run"))
    folder.chmod(0o755)
    made = Cluster(folder)
    # The plugin takes SLURM's variables out of a job's environment, so the commands in it look where all look.
    SYSTEM_CONF.symlink_to(folder / "slurm.conf")
    try:
        made.start("munged")
        made.until("munge's socket", (folder / "munge.socket").exists)
        made.start("slurmctld")
        made.start("slurmd")
        made.until("an idle node", lambda: made.node_state() == "idle")
        yield made
    finally:
        made.stop()
        SYSTEM_CONF.unlink()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def profile(tmp_path):
    """The committed SLURM profile with what a person changes in it: partition, no GPU, little memory, quick polling."""
    folder = tmp_path / "profile"
    folder.mkdir()
    settings = yaml.safe_load((WORKFLOW / "profiles/slurm/config.yaml").read_text())
    settings |= {"slurm-init-seconds-before-status-checks": 3, "latency-wait": 20}
    settings["default-resources"] = {"slurm_partition": "'test'", "mem_mb": 300, "runtime": 10}
    settings["set-threads"] = dict.fromkeys(settings["set-threads"], 1)
    settings.pop("set-resources")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder)


def begin(cluster: Cluster, project: Path, profile: str) -> subprocess.Popen:
    with (project / "study.log").open("a") as log:
        study = subprocess.Popen(
            [sys.executable, WORKFLOW / "study.py", "--params", project / "set.yaml", "--profile", profile],
            env={**cluster.environment, "SDTP_ROOT": str(project)},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    cluster.studies.append(study)
    return study


def starts(project: Path) -> collections.Counter:
    path = project / "starts.txt"
    return collections.Counter(path.read_text().splitlines() if path.exists() else ())


def shared_project(stand_in_project, **settings) -> Path:
    project = stand_in_project("01_saliency", "04_latency", latency="keep_ratio: float = 0.9  # share kept\n")
    (project / "set.yaml").write_text(yaml.safe_dump({"run": "r", **settings}))
    return project


def told(project: Path) -> str:
    return (project / "study.log").read_text()


def test_a_sweep_survives_a_failing_job_a_drained_node_and_a_killed_controller(cluster, profile, stand_in_project):
    project = shared_project(
        stand_in_project,
        common={"pause_s": 4.0},
        notebooks={"01_saliency": {}, "04_latency": {"fail_at": [2]}},
        sweep={"seed": [0, 1, 2], "keep_ratio": [0.9, 0.8]},
    )
    study = begin(cluster, project, profile)
    cluster.until("a running job", lambda: cluster.running() > 0, 90)

    cluster.ask("scontrol", "update", f"nodename={cluster.host}", "state=drain", "reason=test")
    cluster.until("a drained node", lambda: cluster.node_state() in ("drained", "draining"))
    cluster.until("only waiting jobs", lambda: cluster.running() == 0, 90)
    held = len(starts(project))
    time.sleep(5)
    assert study.poll() is None and len(starts(project)) == held, "nothing starts on a drained node"
    cluster.ask("scontrol", "update", f"nodename={cluster.host}", "state=resume")
    cluster.until("jobs again", lambda: cluster.running() > 0, 90)

    # The controller saves its state every few seconds; what it started after that it does not know when it comes back,
    # and then takes the node out (seen here). So let it save, as any controller that fails at some moment mostly has.
    time.sleep(7)
    assert cluster.running() > 0, "killed while a job runs"
    cluster.processes["slurmctld"].send_signal(signal.SIGKILL)
    cluster.processes["slurmctld"].wait()
    time.sleep(8)
    cluster.start("slurmctld")
    assert study.wait(900) != 0, "two jobs failed on purpose"

    # A job whose step is created while the controller is away fails before its notebook starts: the profile's retry.
    started = starts(project)
    failing = {f"04_latency data/results/r/keep_ratio-{ratio}__seed-2" for ratio in (0.9, 0.8)}
    assert len(started) == 9 and all(started[line] == (2 if line in failing else 1) for line in started), started
    done = {path.parent.name for path in project.rglob("04_latency.done.json")}
    assert done == {f"keep_ratio-{ratio}__seed-{seed}" for seed in (0, 1) for ratio in (0.9, 0.8)}
    assert "FAILED  04_latency, cell 8" in told(project) and "7 of 9 done" in told(project)

    # Mended, only what failed runs again.
    (project / "mended").touch()
    assert begin(cluster, project, profile).wait(600) == 0, told(project)[-3000:]
    assert starts(project) - started == collections.Counter(failing)
    assert all(len(read_rows(path)) == 3 for path in project.rglob("*.jsonl"))
    assert len(list(project.rglob("*.jsonl"))) == 9


def test_a_killed_study_lets_its_jobs_end_and_runs_none_of_them_twice(cluster, profile, stand_in_project):
    project = shared_project(
        stand_in_project,
        common={"pause_s": 2.0},
        sweep={"seed": [0, 1, 2, 3], "keep_ratio": [0.9]},
    )
    study = begin(cluster, project, profile)
    cluster.until("a running job", lambda: cluster.running() > 0, 90)
    os.killpg(study.pid, signal.SIGKILL)
    study.wait()
    assert cluster.queued() > 0, "SLURM's jobs outlive the study"

    assert begin(cluster, project, profile).wait(900) == 0, told(project)[-3000:]
    assert "waiting for" in told(project) and "SLURM job(s) of an earlier study" in told(project)
    started = starts(project)
    assert len(started) == 8 and set(started.values()) == {1}, started
