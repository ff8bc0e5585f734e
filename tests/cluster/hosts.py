"""Two network hosts on this machine: namespaces with an address of their own, joined by a cable that can be cut.

It needs root and Debian's iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

TOOLS = ("ip",)


def missing() -> str:
    """Why there can be no such hosts here; '' when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "ip not installed: apt-get install iproute2"
    name = f"reid{os.getpid()}x"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    ip("netns", "del", name)
    return ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """with Hosts() as hosts: hosts.start(0, [...]) and hosts.start(1, [...]) run commands on them."""

    ADDRESSES = ("10.77.0.1", "10.77.0.2")
    INTERFACE = "cable"

    def __init__(self) -> None:
        self.names = [f"reid{os.getpid()}{letter}" for letter in "ab"]

    def __enter__(self) -> Hosts:
        for name in self.names:
            ip("netns", "add", name)
        a, b = self.names
        ip("link", "add", self.INTERFACE, "netns", a, "type", "veth", "peer", "name", self.INTERFACE, "netns", b)
        for name, address in zip(self.names, self.ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", self.INTERFACE)
            for link in ("lo", self.INTERFACE):
                ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            ip("netns", "del", name)

    def start(self, host: int, command: list[str], output: Path, env: dict[str, str]) -> subprocess.Popen:
        """Starts a command on a host; its stdout and stderr go to a file."""
        with output.open("wb") as stream:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command], env=env, stdout=stream, stderr=subprocess.STDOUT
            )

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.INTERFACE, "down")

    def heal(self) -> None:
        ip("-n", self.names[1], "link", "set", self.INTERFACE, "up")
