"""The test network does what it says, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.net import lan as network
from tests.net.lan import Lan

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(network.unavailable()), reason=network.unavailable())]
ROOT = Path(__file__).parents[2]


def namespaces() -> set[str]:
    """Return all network namespaces that a process is in or holds open."""
    found = set()
    for entry in (*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")):
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("net:["):
            found.add(target)
    return found


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Return False for zombies too: those only wait for whoever adopted them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = namespaces()
    yield
    assert network.groups_of(os.getpid()) == []
    # Others on this machine may make namespaces at the same time; ours have no process of another owner in them.
    mine = {str(Path(f"/proc/{child}/ns/net").readlink()) for child in children()}
    assert mine - before == set()


def children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [pid for pid in map(int, path.read_text().split()) if is_running(pid)] if path.exists() else []


@pytest.mark.parametrize("milliseconds", [0.0, 5.0, 20.0, 50.0])
def test_round_trips_are_as_chosen(milliseconds: float) -> None:
    with Lan(hosts=3, round_trip_ms=milliseconds) as lan:
        measured = lan.host(0).round_trips_ms(lan.host(2), count=15)
        assert len(measured) == 15
        assert min(measured) >= milliseconds
        # The fastest five: a busy machine delays the process that measures.
        assert sorted(measured)[4] < milliseconds + 1.0


def test_delays_change_while_it_runs_and_differ_by_pair() -> None:
    with Lan(hosts=3) as lan:
        lan.set_round_trip(30, 0, 1)
        assert statistics.median(lan.host(0).round_trips_ms(lan.host(1), 5)) >= 30
        assert statistics.median(lan.host(1).round_trips_ms(lan.host(2), 5)) < 5
        lan.set_round_trip(10, 2)
        assert statistics.median(lan.host(1).round_trips_ms(lan.host(2), 5)) >= 10
        assert statistics.median(lan.host(0).round_trips_ms(lan.host(1), 5)) >= 30
        lan.set_round_trip(0)
        assert statistics.median(lan.host(0).round_trips_ms(lan.host(1), 5)) < 5


def test_a_cut_loses_everything_until_it_heals() -> None:
    with Lan(hosts=3) as lan:
        lan.cut(0, 1)
        assert lan.host(0).round_trips_ms(lan.host(1), 2, timeout_s=0.2) == []
        assert len(lan.host(0).round_trips_ms(lan.host(2), 2)) == 2
        lan.heal(0, 1)
        assert len(lan.host(0).round_trips_ms(lan.host(1), 2)) == 2
        lan.isolate(2)
        assert lan.host(0).round_trips_ms(lan.host(2), 1, timeout_s=0.2) == []
        assert len(lan.host(0).round_trips_ms(lan.host(1), 1)) == 1
        lan.rejoin(2)
        assert len(lan.host(2).round_trips_ms(lan.host(0), 1)) == 1


RECEIVE = """
import socket, sys, time
server = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
peer, _ = server.accept()
first, total = None, 0
while data := peer.recv(1 << 20):
    first = first or time.monotonic()
    total += len(data)
print(total, time.monotonic() - first, flush=True)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000)) as peer:
    peer.sendall(bytes(int(sys.argv[2])))
"""


def test_a_rate_limits_what_a_host_sends_and_bytes_are_counted() -> None:
    size = 2_000_000
    with Lan(hosts=2, round_trip_ms=2) as lan:
        lan.set_rate(40, 0)
        receiver = lan.host(1).popen([sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True)
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        before = lan.bytes_sent(0, 1)
        lan.host(0).popen([sys.executable, "-c", SEND, lan.host(1).address, str(size)]).wait(30)
        total, seconds = receiver.stdout.readline().split()
        assert int(total) == size
        assert float(seconds) >= size * 8 / 40e6 * 0.8
        assert size < lan.bytes_sent(0, 1) - before < size * 1.2
        assert lan.bytes_sent(1, 0) > 0


BURN = """
import time
end = time.monotonic() + 1.0
while time.monotonic() < end:
    pass
print(time.process_time())
"""


def test_a_process_gets_its_share_of_a_core_and_no_more() -> None:
    with Lan(hosts=1) as lan:
        process = lan.host(0).popen([sys.executable, "-c", BURN], cpu=0.4, stdout=subprocess.PIPE, text=True)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert 0.05 < float(out) < 0.55  # start included


def test_a_host_sees_only_its_own_network() -> None:
    listing = "import socket; print(*sorted(name for _, name in socket.if_nameindex()))"
    with Lan(hosts=1) as lan:
        command = lan.host(0).command([sys.executable, "-c", listing])
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["lan0", "lo"]


def test_processes_end_with_it_even_those_that_others_started() -> None:
    script = (
        "import subprocess as s; print(s.Popen(['sleep', '1000'], start_new_session=True).pid, flush=True); input()"
    )
    with pytest.raises(ZeroDivisionError), Lan(hosts=1) as lan:
        parent = lan.host(0).popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        assert is_running(grandchild)
        raise ZeroDivisionError
    until(lambda: not is_running(grandchild), "a grandchild lives on")
    assert not is_running(parent.pid)
    lan.close()


OWNER = """
import subprocess, sys, time
from tests.net.lan import Lan
lan = Lan(hosts=2)
process = lan.host(1).popen(["sh", "-c", "echo; exec sleep 1000"], cpu=0.4, stdout=subprocess.PIPE)
process.stdout.readline()
print(lan.switch_pid, process.pid, flush=True)
time.sleep(1000)
"""


def started() -> tuple[subprocess.Popen[str], int, int]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    switch, worker = map(int, owner.stdout.readline().split())
    return owner, switch, worker


def test_a_killed_owner_leaves_nothing() -> None:
    owner, switch, worker = started()
    inside = str(Path(f"/proc/{worker}/ns/net").readlink())
    assert len(network.groups_of(owner.pid)) == 1
    owner.kill()
    owner.communicate(timeout=10)
    until(lambda: not is_running(switch), "the switch lives on")
    assert not is_running(worker)
    assert network.groups_of(owner.pid) == []
    until(lambda: inside not in namespaces(), "a namespace lives on")


def test_what_a_killed_switch_leaves_the_next_one_clears() -> None:
    owner, switch, worker = started()
    os.kill(switch, signal.SIGKILL)
    owner.kill()
    owner.communicate(timeout=10)
    assert is_running(worker)
    with Lan(hosts=1):
        assert network.groups_of(owner.pid) == []
    until(lambda: not is_running(worker), "a worker lives on")


def test_more_hosts_than_there_can_be_are_refused() -> None:
    with pytest.raises(ValueError, match="33 hosts"):
        Lan(hosts=33)
