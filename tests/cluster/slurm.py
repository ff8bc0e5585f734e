"""A real SLURM on this machine: munged, slurmctld and a slurmd for each of some virtual nodes, without systemd.

It needs root and Debian's slurm-wlm and munge. All its files are in a folder of its own, all its ports are free ones,
and it is up and down again in about a second. Each node has 2 GPUs that exist on paper alone.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.ranks import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "setpriv")

# Jobs of `high` take the nodes of jobs of `low`, which get SIGTERM, then up to 15 s, and are queued again.
CONF = """
ClusterName=tests
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no SLURM here; '' when there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    lacking = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"{', '.join(lacking)} not installed: apt-get install slurm-wlm munge" if lacking else ""


class Slurm:
    """with Slurm() as slurm: slurm.submit([...]); the environment that its commands need is slurm.env."""

    def __init__(self, num_nodes: int = 2):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged runs as a user of its own
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.names = [f"node{i + 1}" for i in range(num_nodes)]

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def _start(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=64 RealMemory=8000 "
            "Gres=gpu:2"
            for name in self.names
        )
        conf = CONF.format(
            host=host, port=free_port(), folder=self.folder, nodes=nodes, first_job=random.randrange(1, 12000)
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        for name in ("gpu0", "gpu1"):
            (self.folder / name).touch()
        (self.folder / "state").mkdir()
        self._start_munge()
        self._call("slurmctld", "-c", "-f", self.folder / "slurm.conf")
        for name in self.names:
            (self.folder / f"spool.{name}").mkdir()
            self._call("slurmd", "-c", "-N", name, "-f", self.folder / "slurm.conf")
        self._wait(lambda: self.query("sinfo", "-h", "-N", "-p", "low", "-o", "%T").count("idle") == len(self.names))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o700)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        user = pwd.getpwnam("munge")
        for path in (folder, folder / "key"):
            os.chown(path, user.pw_uid, user.pw_gid)
        (self.folder / "munge.pid").touch()
        for name in ("munge.pid", "munge.log", "munge.seed"):
            (self.folder / name).touch()
            os.chown(self.folder / name, user.pw_uid, user.pw_gid)
        os.chown(self.folder, user.pw_uid, user.pw_gid)  # the socket
        to = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "munged", "--force"]
        files = {"key-file": folder / "key", "socket": self.folder / "munge.socket"}
        files |= {f"{n}-file": self.folder / f"munge.{n}" for n in ("pid", "log", "seed")}
        self._call(*to, *(f"--{flag}={path}" for flag, path in files.items()))

    def __exit__(self, *error: object) -> None:
        for job in self.query("squeue", "-h", "-o", "%A").split():
            self.query("scancel", job)
        self._wait(lambda: not self.query("squeue", "-h"))
        self._stop()

    def _stop(self) -> None:
        pids = [int(text) for file in self.folder.glob("*.pid") if (text := file.read_text())]
        for pid in reversed(pids):
            stop(pid)
        shutil.rmtree(self.folder)

    def _call(self, *command: object) -> None:
        done = subprocess.run([str(c) for c in command], env=self.env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def query(self, *command: str) -> str:
        """What a command prints."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30).stdout

    def _wait(self, holds, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        return "\n".join(f"{f.name}: {f.read_text(errors='replace')[-2000:]}" for f in self.folder.glob("*.log"))

    def submit(self, *words: object, env: dict[str, str] | None = None) -> int:
        """sbatch with these words; returns the job's id."""
        command = ["sbatch", "--parsable", *(str(w) for w in words)]
        done = subprocess.run(command, env=self.env | (env or {}), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, ..."""
        words = self.query("scontrol", "show", "job", str(number), "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: int, *states: str, seconds: float) -> dict[str, str]:
        """The job, once it is in one of these states."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).get("JobState") not in states:
            assert time.monotonic() < deadline, f"{job}\n{self.logs()}"
            time.sleep(0.1)
        return job


def stop(pid: int) -> None:
    """SIGTERM to a daemon of ours, SIGKILL after 3 s."""
    for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 1.0)):
        deadline = time.monotonic() + seconds
        try:
            os.kill(pid, number)
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return
