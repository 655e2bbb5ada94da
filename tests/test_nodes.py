"""Ranks on several nodes: two network namespaces of this machine stand for them, joined by a cable of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
RANK = """
import json, sys, time
from pathlib import Path
from steering.learning import MeetingPoint, Rendezvous
from steering.learning.group import Place, leave
from tests.test_checkpoint import loop_of, train

rank, folder, interface = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] or None
if rank == 0:
    point = MeetingPoint("10.77.0.1", interface=interface)
    draft = folder / "draft"
    draft.write_text(str(point.rendezvous.port))
    draft.rename(folder / "port")
while not (folder / "port").exists():
    time.sleep(0.05)
where = Rendezvous("10.77.0.1", int((folder / "port").read_text()), interface)
loop = loop_of(rank=rank)
loop.connect(Place(rank=rank, ranks=2, where=where, deadline=60.0).join(device="cpu"))
tally = train(loop, 30)
total = sum(float(p.double().sum()) for p in loop.network.parameters())
print(json.dumps([tally.representatives, tally.remote, total]))
loop.disconnect()
leave()
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    """Two namespaces whose interfaces are called eth0, with the addresses 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"steering-{os.getpid()}-{k}" for k in range(2)]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespace: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for k, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{k + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_ranks_of_two_nodes_train_and_rehearse_together(nodes, tmp_path):
    """Nothing but the cable joins them: half of what each rehearses comes from the other, and their weights agree.

    One rank is given its interface, the other finds the one that leads to the meeting point.
    """
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(k), str(tmp_path), "eth0" * k],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k, name in enumerate(nodes)
    ]
    try:
        said = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    one, two = (json.loads(out) for out, _ in said)
    assert one[2] == two[2]
    for representatives, remote, _ in (one, two):
        assert representatives > 5 * 25
        assert 0.3 < remote / representatives < 0.7
