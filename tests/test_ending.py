"""Who says how a run ended: the process that started it while it is there, else the runner."""

from __future__ import annotations

import pytest
from distributed import Client, LocalCluster

from steering.clusters.local import quiet
from steering.runner import ending
from steering.runner.folder import RunFolder


async def good():
    return {"frames_acquired": 3}


async def bad():
    raise RuntimeError("found no beam, expected one: open the shutter")


class Runner:
    """Ends at once."""

    async def run(self, work, folder, name, driver):
        return await ending.ending_with(work(), folder, name, driver)


@pytest.fixture(scope="module")
def cluster():
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 2, "dashboard_address": "127.0.0.1:0"}
    with quiet(), LocalCluster(protocol="inproc://", **options) as made, Client(made) as client:
        yield client


@pytest.fixture
def reports(monkeypatch):
    """The folders for which a report was asked for."""
    asked = []
    monkeypatch.setattr(ending, "report", asked.append)
    return asked


def ended(cluster, folder, work, driver):
    future = cluster.submit(Runner, actor=True, pure=False)
    runner = future.result()
    cluster.publish_dataset(future, name="campaign")
    try:
        return runner.run(work, folder, "campaign", driver).result()
    finally:
        assert "campaign" not in cluster.list_datasets()


def made(tmp_path, by_command):
    workflow = tmp_path / "work.py"
    workflow.write_text("")
    return RunFolder.create(tmp_path / "run", workflow if by_command else None)


def test_the_command_that_started_a_run_ends_it(cluster, tmp_path, reports):
    folder = made(tmp_path, by_command=True)
    assert ended(cluster, folder, good, cluster.id) == {"frames_acquired": 3}
    assert folder.summary()["status"] == "running"
    assert reports == []


def test_where_it_is_gone_the_runner_does_and_has_the_report_written(cluster, tmp_path, reports):
    folder = made(tmp_path, by_command=True)
    ended(cluster, folder, good, "Client-that-was-killed")
    assert folder.summary()["status"] == "finished"
    assert [report.path for report in reports] == [folder.path]


def test_a_run_without_a_command_is_ended_by_the_runner(cluster, tmp_path, reports):
    folder = made(tmp_path, by_command=False)
    ended(cluster, folder, good, cluster.id)
    assert folder.summary()["status"] == "finished"
    assert reports == []


def test_a_failure_is_said_with_its_traceback(cluster, tmp_path, reports):
    folder = made(tmp_path, by_command=True)
    with pytest.raises(RuntimeError, match="open the shutter"):
        ended(cluster, folder, bad, "Client-that-was-killed")
    summary, last = folder.summary(), folder.events()[-1]
    assert (summary["status"], summary["reason"]) == ("failed", "found no beam, expected one: open the shutter")
    assert last["event"] == "RunEnded"
    assert "Traceback (most recent call last)" in last["traceback"]
