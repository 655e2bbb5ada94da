"""What every cluster promises. A new kind of cluster is one more entry in CLUSTERS."""

from __future__ import annotations

import gc
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import Client, Scheduler, Worker

from steering.clusters import existing, local
from steering.clusters.script import is_guarded
from steering.runner import RunFolder, attach, start
from tests.test_runner import experiment

pytestmark = pytest.mark.slow
DASK = [sys.executable, "-m", "dask"]
PAGE = Path(__file__).parents[1] / "docs/tutorials/cluster.md"


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 180
    while not true():
        assert time.monotonic() < deadline, f"waited three minutes for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def scheduler_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster that somebody else started, by the command lines of the tutorial."""
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    scheduler, *workers = [
        shlex.split(line)[2:] for line in PAGE.read_text().splitlines() if line.startswith("$ dask ")
    ]
    free_ports = ["--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    processes = [subprocess.Popen([*DASK, *scheduler, *free_ports], **quiet)]  # type: ignore[call-overload]
    try:
        wait_until(file.is_file, "the scheduler file")
        for worker in workers:
            processes.append(subprocess.Popen([*DASK, *worker, "--no-nanny"], **quiet))  # type: ignore[call-overload]
        yield file
    finally:
        for process in reversed(processes):
            process.kill()  # how dask's own commands end is not what is tested here
            process.wait()


@pytest.fixture(scope="module")
def here() -> Iterator[Client]:
    """A local cluster with two ranks, whose workers share what they import."""
    with local(ranks=2) as client:
        yield client


@pytest.fixture(scope="module")
def running(here: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its scheduler file: to others it is a cluster that goes on, whoever comes and goes."""
    file = tmp_path_factory.mktemp("running") / "scheduler.json"
    here.write_scheduler_file(str(file))
    return file


def open_local(request: pytest.FixtureRequest) -> AbstractContextManager[Client]:
    return nullcontext(request.getfixturevalue("here"))


def open_existing(request: pytest.FixtureRequest) -> AbstractContextManager[Client]:
    return existing(str(request.getfixturevalue("scheduler_file")), ranks=2, timeout=60)


CLUSTERS = {"local": open_local, "existing": open_existing}


@pytest.mark.parametrize("open_cluster", CLUSTERS.values(), ids=CLUSTERS.keys())
def test_workers_carry_the_roles(open_cluster: Callable, request: pytest.FixtureRequest) -> None:
    with open_cluster(request) as client:
        assert sum("trainer" in carried for carried in resources_of(client).values()) == 2
        for role in ("inference", "source", "label", "runner"):
            assert client.submit(lambda: os.getpid(), resources={role: 1}, pure=False).result(timeout=60) != os.getpid()

        def rank_process(rank: int) -> int:
            time.sleep(0.3)  # so that the other rank goes to the other worker
            return os.getpid()

        ranks = client.map(rank_process, range(2), resources={"trainer": 1})
        assert len(set(client.gather(ranks))) == 2, "one process for each rank"


def pages_of_a_hundred_arrays() -> int:
    """Pages that the system gave for arrays of 1 MiB, made and freed one after the other, of 256 pages each."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(100):
        np.ones(2**17)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_workers_keep_the_memory_that_they_use_again(here: Client) -> None:
    """As Dask starts workers, each array would be made of new pages: 25,600."""
    for role in ("trainer", "label", "inference"):
        assert here.submit(pages_of_a_hundred_arrays, resources={role: 1}, pure=False).result() < 2000


def test_local_leaves_nothing_behind_when_the_body_raises() -> None:
    pids: list[int] = []
    folders: list[str] = []

    def body() -> None:
        with local(ranks=1) as client:
            pids.extend(client.run(os.getpid).values())
            folders.extend(client.run(lambda dask_worker: dask_worker.local_directory).values())
            assert client.scheduler.address.startswith("tcp://127.0.0.1:")
            assert all(Path(folder).is_dir() for folder in folders)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert len(pids) == len(folders) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not any(Path(folder).exists() for folder in folders)


def test_two_local_clusters_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of each see the environment of the moment when it was started, and one thread."""
    monkeypatch.setenv("SAID_JUST_NOW", "yes")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with local(ranks=1) as one:
        monkeypatch.setenv("SAID_JUST_NOW", "no")
        with local(ranks=1) as other:
            assert one.scheduler.address != other.scheduler.address
            assert not set(one.run(os.getpid).values()) & set(other.run(os.getpid).values())
            for client, word in ((one, "yes"), (other, "no")):
                said = client.run(lambda: (os.environ["SAID_JUST_NOW"], os.environ["OMP_NUM_THREADS"]))
                assert set(said.values()) == {(word, "1")}


def test_a_lost_rank_comes_back(here: Client) -> None:
    address, pid = next((a, pid) for a, pid in here.run(os.getpid).items() if "trainer" in resources_of(here)[a])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid), "the end of the rank")
    wait_until(lambda: sum("trainer" in carried for carried in resources_of(here).values()) == 2, "another one")
    assert address not in resources_of(here)
    assert pid not in here.run(os.getpid).values()


def resources_of(client: Client) -> dict[str, dict[str, float]]:
    """Of each worker, by its address."""
    return {address: worker["resources"] for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()}


DRIVER = """
import importlib, os, sys, time
from steering.clusters import local

importlib.import_module("steering.clusters.local").PRELOAD[1:] = []  # these workers need no more than Dask

if __name__ == "__main__":
    try:
        with local(ranks=1) as client:
            try:
                print(*client.run(os.getpid).values(), flush=True)
                time.sleep(120)
            except KeyboardInterrupt:
                print("alive" if client.submit(sum, [1, 2]).result(timeout=30) == 3 else "wrong", flush=True)
                raise
    except KeyboardInterrupt:
        print("closed", flush=True)
        sys.exit(130)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A driver in a process group of its own, as a terminal gives it, and its workers' process ids."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # where a killed driver leaves its scratch folder
    process = subprocess.Popen([sys.executable, script], start_new_session=True, env=environment, **pipes)  # type: ignore[call-overload]
    try:
        assert process.stdout is not None
        yield process, [int(pid) for pid in process.stdout.readline().split()]
    finally:
        process.kill()
        process.communicate()


def ended(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_ctrl_c_lets_the_driver_close_in_order(driver: tuple[subprocess.Popen, list[int]]) -> None:
    process, workers = driver
    assert len(workers) == 3
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to every process of the group
    out, err = process.communicate(timeout=60)
    assert out.split() == ["alive", "closed"], "the workers still answered, and the cluster was closed"
    assert process.returncode == 130
    assert err == ""
    assert ended(workers)


@pytest.mark.parametrize(
    ("source", "line", "guarded"),
    [
        ("with local() as client:\n    pass", 1, False),
        ('if __name__ == "__main__":\n    main()', 2, True),
        ('if "__main__" == __name__ and wanted:\n    main()', 2, True),
        ('if __name__ != "__main__":\n    raise SystemExit\nmain()', 3, True),
        ('if __name__ == "__main__":\n    pass\nmain()', 3, False),
        ('main()\nif __name__ == "__main__":\n    pass', 1, False),
        ("if wanted:\n    main()", 2, False),
    ],
)
def test_it_is_seen_what_a_script_does_only_as_a_script(source: str, line: int, guarded: bool) -> None:
    assert is_guarded(source, line) == guarded


def test_a_script_that_its_workers_would_start_anew_is_refused_in_a_sentence(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text("from steering import local\n\nwith local(ranks=1) as client:\n    print(client)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"RuntimeError: {script}:3: found a cluster of this machine that starts while the script")
    assert 'expected it below `if __name__ == "__main__":`' in last
    assert done.stderr.count("Traceback") == 1
    assert "bootstrapping" not in done.stderr


def test_the_main_module_of_a_package_is_not_imported_by_workers_and_needs_no_guard(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    main = tmp_path / "plain" / "__main__.py"
    main.write_text("from steering.clusters.script import refuse_unguarded\n\nrefuse_unguarded()\nprint('goes on')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    for how, said in ((["-m", "plain"], "goes on\n"), ([str(main)], "")):
        done = subprocess.run([sys.executable, *how], env=environment, capture_output=True, text=True, check=False)
        assert done.stdout == said, done.stderr


def test_workers_die_with_a_killed_driver(driver: tuple[subprocess.Popen, list[int]]) -> None:
    process, workers = driver
    process.kill()
    process.wait(timeout=30)
    wait_until(lambda: ended(workers), "the end of the workers")


def test_existing_goes_on_running_and_takes_an_address(scheduler_file: Path) -> None:
    with existing(str(scheduler_file), ranks=2, timeout=60) as client:
        with existing(client.scheduler.address, ranks=2, timeout=60) as other:
            assert other.submit(sum, [1, 2]).result(timeout=60) == 3
        assert client.submit(sum, [3, 4]).result(timeout=60) == 7


def left_over(client: Client) -> list[str]:
    """What of a campaign is still on the cluster: keys, actors, data, and the objects themselves."""

    def on_scheduler(dask_scheduler: Scheduler) -> list[str]:
        return [str(key) for key in dask_scheduler.tasks]

    def known_to(dask_worker: Worker) -> list[str]:
        return [*map(str, dask_worker.state.actors), *map(str, dask_worker.data)]

    def alive() -> list[str]:
        gc.collect()
        kinds = [type(thing) for thing in gc.get_objects()]
        ours = ("runner.runner", "runner.source_actor", "inference.predictor", "inference.live", "learning.rank")
        return [kind.__name__ for kind in kinds if kind.__module__ in [f"steering.{room}" for room in ours]]

    gc.collect()  # this process holds the runner by what it was told
    held = client.run_on_scheduler(on_scheduler) + list(client.list_datasets())
    for of_worker in (known_to, alive):  # to look at all objects takes long: once nothing else is left
        held = held or [thing for things in client.run(of_worker).values() for thing in things]
    return held


def test_a_campaign_leaves_nothing_on_a_cluster_where_another_one_follows(running: Path, tmp_path: Path) -> None:
    """A second one at the same time is refused, and disturbs nothing."""
    with existing(str(running), ranks=2, timeout=60) as client:
        for number in range(2):
            run = start(experiment(60), client, RunFolder.create(tmp_path / f"run-{number}"))
            with pytest.raises(RuntimeError, match=f"found the campaign run-{number} running on the cluster at tcp:"):
                start(experiment(60), client, RunFolder.create(tmp_path / f"beside-{number}"))
            figures = run.result()
            assert figures["frames_predicted"] == figures["frames_acquired"] == 60
            assert run.snapshot()["status"] == "finished"  # who comes late is still answered
            assert run.live() is not None
            del run
            wait_until(lambda: not left_over(client), "the cluster to be as it was")


WORKFLOW = """
from steering import cluster, run
from tests.test_runner import experiment

def main(folder, arguments):
    with cluster(arguments[0], ranks=2, folder=folder.path) as client:
        run(experiment(60), client, folder)
"""


def test_a_run_goes_on_without_its_driver_and_ends_itself(running: Path, tmp_path: Path) -> None:
    """kill -9 of `steering run` on a cluster that outlives it: the run's end and report do not depend on it."""
    (tmp_path / "work.py").write_text(WORKFLOW)
    command = [sys.executable, "-m", "steering.cli", "run", "--out", "run", "work.py", str(running)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    driver = subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet)  # type: ignore[call-overload]
    try:
        wait_until((tmp_path / "run" / "scheduler.json").is_file, "the campaign")
    finally:
        driver.kill()
        driver.wait()
    with attach(tmp_path / "run") as run:
        figures = run.result()
    assert figures["status"] == "finished"
    assert figures["frames_predicted"] == figures["frames_acquired"] == 60
    wait_until((tmp_path / "run" / "report.html").is_file, "the report")
    with existing(str(running), ranks=2, timeout=60) as client:
        wait_until(lambda: not left_over(client), "the cluster to be as it was")


def test_existing_names_the_roles_that_are_missing(scheduler_file: Path) -> None:
    with existing(str(scheduler_file), ranks=2, timeout=60) as client:
        address = client.scheduler.address
    with (
        pytest.raises(RuntimeError, match="missing 2 with the resource trainer") as caught,
        existing(address, ranks=4, timeout=1),
    ):
        pass
    there = f"dask worker {address} --nthreads 1 --memory-limit 0 --dashboard-address 127.0.0.1:0"
    assert f'{there} --resources "trainer=1"' in str(caught.value)


def test_existing_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dask scheduler --scheduler-file"), existing(str(tmp_path / "no.json")):
        pass
    with (
        pytest.raises(OSError, match="no scheduler that answers at tcp:"),
        existing("tcp://127.0.0.1:9", timeout=1),
    ):
        pass
    with pytest.raises(ValueError, match="ranks"), local(ranks=0):
        pass
