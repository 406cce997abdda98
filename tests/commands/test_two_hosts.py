# SPDX-License-Identifier: Apache-2.0
"""scripts/two_hosts.sh: two hosts on one machine, gone when the command is."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "two_hosts.sh"
SMALL_TOOLS = ("bash", "uname", "id", "seq", "sleep", "sed", "nproc")


def _can_make_hosts() -> bool:
    if os.name != "posix" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        return False
    name = f"seqpar-test-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made.returncode == 0


needs_hosts = pytest.mark.skipif(
    not _can_make_hosts(), reason="needs root, ip, tc and network namespaces"
)


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def hosts(owner: int | None = None) -> list[str]:
    """Pretended hosts of the script with that process id, or of all: others may run meanwhile."""
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    start = "seqpar" if owner is None else f"seqpar{owner}-"
    return [line.split()[0] for line in listing.stdout.splitlines() if line.startswith(start)]


def left_behind() -> set[str]:
    """Hosts whose script is no more."""
    return {name for name in hosts() if not Path("/proc", name[6:].split("-")[0]).exists()}


@needs_hosts
def test_both_hosts_run_the_command_and_know_which_they_are():
    before = left_behind()
    words = "echo {node} $SEQPAR_LINK $GLOO_SOCKET_IFNAME $PET_NODE_RANK $PET_NNODES"
    done = run("bash", "-c", words)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == ["0 link0 link0 0 2", "1 link1 link1 1 2"]
    assert left_behind() <= before


@needs_hosts
def test_bytes_take_as_long_as_the_rate_says():
    """Five MB at 20 Mbit/s are two seconds, but for the burst."""
    code = (
        "import socket, time\n"
        "node, address, port = {node}, '{address}', {port}\n"
        "if node == 0:\n"
        "    server = socket.create_server((address, port))\n"
        "    peer, _ = server.accept()\n"
        "    start, got = time.perf_counter(), 0\n"
        "    while part := peer.recv(1 << 16):\n"
        "        got += len(part)\n"
        "    print(got, time.perf_counter() - start)\n"
        "else:\n"
        "    for _ in range(400):\n"
        "        try:\n"
        "            peer = socket.create_connection((address, port))\n"
        "            break\n"
        "        except OSError:\n"
        "            time.sleep(0.1)\n"
        "    peer.sendall(bytes(5_000_000))\n"
    )
    for _ in range(3):  # a busy machine may let the receiver wait
        done = run("--rate", "20mbit", "python3", "-c", code)
        assert done.returncode == 0, done.stderr
        got, seconds = done.stdout.split()
        assert int(got) == 5_000_000
        assert float(seconds) > 1.8
        if float(seconds) < 6:
            break
    assert float(seconds) < 6


@needs_hosts
def test_the_first_failure_stops_both_and_is_the_status():
    before, start = left_behind(), time.monotonic()
    done = run("bash", "-c", "[ {node} = 0 ] && exit 7; sleep 50")
    assert done.returncode == 7
    assert time.monotonic() - start < 45  # the other would sleep for 50 seconds
    assert left_behind() <= before


@needs_hosts
def test_a_signal_takes_the_hosts_down():
    running = subprocess.Popen(["bash", str(SCRIPT), "sleep", "50"])
    deadline = time.monotonic() + 40
    while len(hosts(running.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(hosts(running.pid)) == 2
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=40) == 143
    assert hosts(running.pid) == []


@needs_hosts
def test_what_a_killed_run_left_goes_with_the_next_one():
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = f"seqpar{dead.pid}-0"
    subprocess.run(["ip", "netns", "add", name], check=True)
    assert run("true").returncode == 0
    assert name not in hosts()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no command"),
        (("--rate",), "--rate needs a value"),
        (("--speed", "1", "true"), "--speed: unknown"),
    ],
)
def test_wrong_words_are_refused(words, says):
    done = run(*words)
    assert done.returncode == 2
    assert says in done.stderr


def _path_with(folder: Path, **answers: str) -> dict[str, str]:
    """An environment whose PATH has some small tools, and these that say what they are told to."""
    for tool in SMALL_TOOLS:
        found = shutil.which(tool)
        if found and tool not in answers:
            (folder / tool).symlink_to(found)
    for tool, answer in answers.items():
        (folder / tool).write_text(f"#!/bin/sh\necho {answer}\n", encoding="utf-8")
        (folder / tool).chmod(0o755)
    return {"PATH": str(folder)}


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"uname": "Linux", "id": "1000"}, "needs root: sudo bash"),
        ({"uname": "Darwin", "id": "0"}, "Linux only"),
        ({"uname": "Linux", "id": "0"}, "ip was not found; install iproute2"),
    ],
)
def test_machines_that_cannot_are_told_why(tmp_path, answers, says):
    (tmp_path / "sh").symlink_to("/bin/sh")
    done = subprocess.run(
        ["/bin/bash", str(SCRIPT), "true"],
        env=_path_with(tmp_path, **answers),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr


def test_help_is_the_text_at_the_top():
    done = run("--help")
    assert done.returncode == 0
    assert "--rate RATE" in done.stdout
    assert "set -euo" not in done.stdout
