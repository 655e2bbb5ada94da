"""What a job queue is told, and when a job needs a successor: as text and as decisions, without a queue."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
from distributed import LocalCluster

from steering.clusters import Job, Site, add_cluster, cluster, credentials, existing, job_queue
from steering.clusters.existing import refuse_open
from steering.clusters.gpus import dask_setup, shared_out, visible
from steering.clusters.job_options import SYSTEMS, System
from steering.clusters.job_states import JobState, last_words, parsed_condor_q, parsed_qstat, parsed_squeue
from steering.clusters.jobs import refusal_of
from steering.clusters.local import on_gpus, quiet, worker_specs
from steering.clusters.queue import job_script, places
from steering.clusters.site import read_site
from steering.clusters.succession import FAILURES, LAST_S, Place, due, lays_down, lead, successor

pytestmark = pytest.mark.skipif(find_spec("dask_jobqueue") is None, reason="no dask-jobqueue: the extra jobqueue")
ROOT = Path(__file__).parents[1]
SITE = Site(
    trainer=Job(
        cores=8,
        memory="64GiB",
        gpus=4,
        ranks=4,
        walltime="08:00:00",
        partition="gpu",
        account="p7",
        directives=("--exclusive",),
    ),
    interface="ib0",
    python="/env/bin/python",
    modules=("cuda/12",),
    prologue=("export A=1",),
)


# Job scripts.


def lines(tmp_path, system, kind="trainer", site=SITE, security=None):
    return job_script(system, kind, site, tmp_path, security).splitlines()


def test_a_slurm_script_says_all_that_the_site_and_the_role_need(tmp_path):
    security = credentials.make(tmp_path)
    script = lines(tmp_path, "slurm", security=security)
    for line in (
        "#SBATCH -p gpu",
        "#SBATCH -A p7",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=64G",
        "#SBATCH -t 08:00:00",
        "#SBATCH --gres=gpu:4",
        "#SBATCH --exclusive",
        "#SBATCH --no-requeue",
        "module load cuda/12",
        "export OMP_NUM_THREADS=2",
        "export A=1",
    ):
        assert line in script, line
    [worker] = [line for line in script if "dask_worker" in line]
    assert worker.startswith("/env/bin/python -m distributed.cli.dask_worker ")
    for words in (
        "--nworkers 4",
        "--resources trainer=1",
        "--interface ib0",
        "--protocol tls://",
        f"--tls-key {tmp_path}/credentials/key.pem",
        f"--local-directory {tmp_path}/jobs/scratch",
        "--death-timeout 300",
        "--preload steering.clusters.gpus --preload steering.clusters.imports",
    ):
        assert words in worker, words
    assert "PRIVATE KEY" not in "\n".join(script)


def test_ctrl_c_still_closes_a_run_in_order(tmp_path):
    """dask-jobqueue's import would have it exit."""
    lines(tmp_path, "slurm")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_roles_have_jobs_of_their_own(tmp_path):
    assert any("--resources inference=1" in line for line in lines(tmp_path, "slurm", "inference"))
    assert any("--resources source=1,label=1,runner=1" in line for line in lines(tmp_path, "slurm", "beamline"))
    assert not any("gres" in line or "clusters.gpus" in line for line in lines(tmp_path, "slurm", "beamline"))


def test_directives_that_a_site_refuses_are_left_out(tmp_path):
    assert not any("--mem=" in line for line in lines(tmp_path, "slurm", site=replace(SITE, refused=("--mem=",))))


def test_a_pbs_script(tmp_path):
    script = lines(tmp_path, "pbs")
    for line in ("#PBS -q gpu", "#PBS -A p7", "#PBS -l select=1:ncpus=8:ngpus=4:mem=64gb", "#PBS -l walltime=08:00:00"):
        assert line in script, line


def test_an_htcondor_script(tmp_path):
    site = replace(SITE, trainer=replace(SITE.trainer, directives=("Requirements = HasGPU",), disk="8GiB"))
    script = lines(tmp_path, "htcondor", site=site)
    for line in (
        "request_gpus = 4",
        "accounting_group = p7",
        "Requirements = HasGPU",
        "MY.DaskWorkerCores = 8",
        f"MY.DaskWorkerDisk = {8 * 2**30}",
        "Queue",
    ):
        assert line in script, line
    assert any("--resources trainer=1" in line for line in script)


def test_ranks_fill_jobs_and_the_last_job_has_the_rest():
    assert [(p.name, p.processes) for p in places(SITE, 6)] == [
        ("trainer-0", 4),
        ("trainer-1", 2),
        ("inference-0", 1),
        ("beamline-0", 1),
    ]


# Site files.


def test_the_example_is_a_site_file_and_says_every_key():
    text = (ROOT / "workflows" / "site.toml").read_text()
    site = read_site(ROOT / "workflows" / "site.toml")
    assert (site.interface, site.trainer.partition, site.beamline.cores) == ("lo", "debug", 2)
    assert site.inference.memory == "1500MiB"
    for key in (
        "account",
        "directives",
        "python",
        "modules",
        "prologue",
        "refused",
        "scratch",
        "walltime",
        "gpus",
        "deadline_s",
    ):
        assert f"\n{key} =" in text or f"\n# {key} =" in text, key


def test_a_table_holds_for_its_job_and_the_top_for_all(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text('walltime = "00:10:00"\nstart_s = 5\n[trainer]\nwalltime = "08:00:00"\nranks = 2\ncores = 4\n')
    site = read_site(file)
    assert [job.walltime for job in site.jobs.values()] == ["08:00:00", "00:10:00", "00:10:00"]
    assert (site.trainer.ranks, site.start_s) == (2, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition = ", "no valid TOML"),
        ('partitoin = "gpu"', "found partitoin, expected some of account"),
        ("[trainer]\ncores = 'many'", "found .trainer. cores = 'many', expected int"),
        ("[trainer]\ngpus = true", "expected int"),
        ("modules = [1]", "expected a list of strings"),
        ("[trainer]\nranks = 4", "found 1 cores for 4 ranks of a job"),
        ("[gpus]\nn = 1", "found gpus = "),
        ("trainer = 3", r"found trainer = 3, expected a table: a line \[trainer\]"),
        ('memory = "lots"', "found memory='lots', .*expected sizes of a whole job such as '16GiB'"),
        ("start_s = -1", "found start_s=-1, expected seconds above 0"),
        ("handover_s = nan", "found handover_s=nan, expected seconds"),
        ("python = '\0'", "no valid TOML"),
    ],
)
def test_a_wrong_site_file_is_refused_in_words(tmp_path, text, said):
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        read_site(file)
    assert str(file) in str(refused.value)


def test_a_site_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a site file"):
        read_site(tmp_path / "no.toml")
    with pytest.raises(OSError, match=r"found no file to read .Is a directory"):
        read_site(tmp_path)
    (tmp_path / "site.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="found no valid TOML"):
        read_site(tmp_path / "site.toml")


def test_workers_never_listen_on_all_interfaces(tmp_path):
    """On the site's, or on the one by which the node reaches the scheduler: found out there, by the line itself."""
    open_ = replace(SITE, interface=None, python=sys.executable)
    for system in ("slurm", "pbs"):
        [worker] = [line for line in lines(tmp_path, system, site=open_) if "dask_worker" in line]
        assert "--interface" not in worker
        assert "--dashboard-address 127.0.0.1:0" in worker
        found = re.search(r"--host (\$\(.*?'\))", worker)
        assert found, worker
        command = f"echo {found[1].replace('SCHEDULER', '127.0.0.1')}"
        assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout == "127.0.0.1\n"
        assert [line for line in lines(tmp_path, system) if "--host" in line] == []


def test_another_system_is_one_more_entry(tmp_path, monkeypatch):
    """LSF, as a site would add it."""

    def lsf_options(job):
        return {"queue": job.partition, "project": job.account, "walltime": job.walltime[:-3], "ncpus": job.cores}

    def bjobs(jobs):
        return {}

    monkeypatch.setitem(SYSTEMS, "lsf", System("dask_jobqueue.lsf:LSFJob", ("bsub", "bkill"), lsf_options, bjobs))
    script = lines(tmp_path, "lsf")
    for line in ("#BSUB -q gpu", '#BSUB -P "p7"', "#BSUB -n 8", "#BSUB -W 08:00"):
        assert line in script, script


# Successors.

NOW = 1e9


def state(ends=None, what="RUNNING"):
    return JobState(job="1", state=what, ends=ends)


def test_a_job_is_kept_until_its_end_is_near():
    place = Place(kind="trainer", number=0, came=True, lead=lead(state(NOW + 3600), NOW, 300))
    assert due(place, state(NOW + 3600), NOW) == "keep"
    assert due(place, state(NOW + 3600), NOW + 3299) == "keep"
    assert due(place, state(NOW + 3600), NOW + 3301) == "replace"
    assert due(place, state(NOW + 25), NOW) == "replace"  # somebody has shortened it
    assert due(place, None, NOW) == "replace"


def test_a_job_that_waits_is_kept_however_long():
    place = Place(kind="trainer", number=0)
    assert lead(state(None, "PENDING"), NOW, 300) is None
    assert due(place, state(None, "PENDING"), NOW + 1e6) == "keep"


def test_successors_of_short_jobs_are_not_submitted_at_once():
    """Each waits for half of its time, or the queue would fill with them."""
    place = Place(kind="trainer", number=0, came=True, lead=lead(state(NOW + 60), NOW, 300))
    assert due(place, state(NOW + 60), NOW + 29) == "keep"
    assert due(place, state(NOW + 60), NOW + 31) == "replace"


@pytest.mark.parametrize("kind", ["trainer", "inference", "beamline"])
def test_roles_are_laid_down_once_the_successor_is_there(kind):
    assert not lays_down(kind, state(NOW + 300), NOW, heir=False)
    assert lays_down(kind, state(NOW + 300), NOW, heir=True)


def test_near_the_end_what_can_be_kept_is_written_without_a_successor():
    for kind in ("trainer", "beamline"):
        assert lays_down(kind, state(NOW + LAST_S), NOW, heir=False)
        assert not lays_down(kind, state(None, "PENDING"), NOW, heir=False)
    assert not lays_down("inference", state(NOW + LAST_S), NOW, heir=False)  # nothing is in the predictor alone


def test_a_place_whose_workers_never_come_is_given_up():
    place, tried = Place(kind="trainer", number=0), 1
    while due(place, None, NOW) == "replace":
        place, tried = successor(place), tried + 1
    assert tried == FAILURES
    assert due(place, None, NOW) == "give up"
    assert successor(replace(place, came=True)).failures == 0


def test_names_of_workers_are_never_used_twice():
    place = Place(kind="trainer", number=3, processes=2)
    names = [place.name, (second := successor(place)).name, successor(second).name]
    assert names == ["trainer-3", "trainer-3.1", "trainer-3.2"]
    assert second.processes == 2


def test_squeue_is_read_with_its_reasons():
    found = parsed_squeue(
        "12|PENDING|N/A|(Nodes required for job are DOWN, DRAINED)\n"
        "13|RUNNING|2026-11-28T16:00:00|None\n14|COMPLETED|2026-11-28T15:00:00|None\n15|COMPLETING|2026-11-28T15:00:00|None\n"
    )
    assert set(found) == {"12", "13"}
    assert found["12"].reason.startswith("(Nodes required")
    assert found["12"].ends is None
    assert found["13"].reason == ""
    assert found["13"].ends is not None


QSTAT = """Job id            Name             User              Time Use S Queue
----------------  ---------------- ----------------  -------- - -----
12.pbs-server*    steering-trainer beam              00:01:02 R gpu
13.pbs-server*    steering-inferen beam                     0 Q gpu
14.pbs-server*    steering-beamlin beam              00:00:01 E gpu
"""


def test_qstat_is_read_and_a_job_is_over_only_where_it_says_so():
    errors = "qstat: Unknown Job Id 15.pbs-server1\nqstat: 16.pbs-server1 Job has finished, use -x or -H to see it\n"
    found = parsed_qstat(["12", "13", "14", "15", "16"], QSTAT, errors)
    assert {job: one.state for job, one in found.items()} == {"12": "RUNNING", "13": "QUEUED"}
    assert parsed_qstat(["15"], "", "qstat: Unknown Job Id Error 15.torque7\n") == {}
    assert parsed_qstat(["12", "15"], QSTAT, "") is None, "it says nothing of 15"
    assert parsed_qstat(["12"], "", "qstat: cannot connect to server pbs-server1 (errno=15010)\n") is None


def test_condor_q_is_read_with_why_a_job_is_held():
    found = parsed_condor_q("7.0 2 undefined\n8.0 5 Disk quota of beam is used up\n9.0 4 undefined\n")
    assert [(one.job, one.state, one.reason) for one in found.values()] == [
        ("7.0", "RUNNING", ""),
        ("8.0", "HELD", "Disk quota of beam is used up"),
    ]


def test_a_refusal_is_told_in_the_systems_own_words():
    error = RuntimeError(
        "Command exited with non-zero exit code.\nstdout:\n\nstderr:\nsbatch: error: Invalid account\n"
    )
    assert refusal_of(error) == "sbatch: error: Invalid account"
    assert last_words("a\n\nb \nc\n") == "b / c"


# GPUs.


@pytest.mark.parametrize(
    ("gpus", "ranks", "of_ranks", "of_predictor"),
    [
        ([], 2, ["", ""], ""),
        (["0"], 2, ["0", "0"], "0"),
        (["0", "1"], 2, ["0", "1"], "1"),
        (["0", "1", "2"], 2, ["0", "1"], "2"),
        (["0", "1"], 3, ["0", "1", "0"], "1"),
    ],
)
def test_ranks_take_gpus_in_turn_and_the_predictor_one_of_its_own_where_there_is_one(
    gpus, ranks, of_ranks, of_predictor
):
    assert shared_out(gpus, ranks) == (of_ranks, of_predictor)


def test_gpus_are_those_that_the_environment_shows(tmp_path):
    assert visible({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ["2", "5"]
    assert visible({"CUDA_VISIBLE_DEVICES": "GPU-ab,GPU-cd"}) == ["GPU-ab", "GPU-cd"]
    assert visible({"CUDA_VISIBLE_DEVICES": ""}) == visible({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert visible({}, tmp_path / "no driver") == []
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:02:00.0").mkdir()
    assert visible({}, tmp_path) == ["0", "1"]


def test_each_local_worker_is_told_its_gpu():
    workers = on_gpus(worker_specs(2), ["3", "5", "7"])
    told = {name: worker["options"]["env"]["CUDA_VISIBLE_DEVICES"] for name, worker in workers.items()}
    assert told == {"trainer-0": "3", "trainer-1": "5", "inference": "7", "beamline": "7"}
    hidden = on_gpus(worker_specs(1), [])
    assert {worker["options"]["env"]["CUDA_VISIBLE_DEVICES"] for worker in hidden.values()} == {""}


class Worker:
    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize(("name", "gpu"), [("trainer-0-0", "4"), ("trainer-0.2-1", "6"), ("inference-0", "4")])
def test_a_worker_of_a_job_takes_the_gpu_of_its_number(monkeypatch, name, gpu):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    dask_setup(Worker(name))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


# What is refused.


@pytest.mark.parametrize("address", ["tcp://192.0.2.7:8786", "192.0.2.7:8786", "tcp://[2001:db8::1]:8786"])
def test_a_scheduler_without_tls_beyond_this_machine_is_refused(address):
    with pytest.raises(PermissionError, match="without TLS beyond this machine"):
        refuse_open(address)
    with pytest.raises(PermissionError), existing(address, timeout=1):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "localhost:1", "tcp://[::1]:1", "tls://192.0.2.7:8786"])
def test_what_stays_on_this_machine_or_has_tls_is_not(address):
    refuse_open(address)


ADDRESS = {
    "empty": b"",
    "a list": b"[1]",
    "no text": b"\xff\xfe\x00",
    "no address": b'{"address": null}',
    "no port": b'{"address": "tls://node7"}',
}


@pytest.mark.parametrize("content", ADDRESS.values(), ids=ADDRESS)
def test_a_scheduler_file_without_an_address_is_refused(tmp_path, content):
    file = tmp_path / "scheduler.json"
    file.write_bytes(content)
    with (
        pytest.raises(OSError, match=r"found no address in it .* expected the file of `dask scheduler"),
        existing(file),
    ):
        pass


def test_a_scheduler_of_other_tls_is_refused_each_time(tmp_path):
    """And the process can connect elsewhere then: a client that Dask leaves open has the next one wait for ever."""
    mine = credentials.make(tmp_path / "mine")
    credentials.make(tmp_path / "other")
    options = {"protocol": "tls://", "security": mine, "dashboard_address": "127.0.0.1:0"}
    with (
        quiet(),
        LocalCluster(n_workers=0, host="127.0.0.1", **options) as one,
    ):
        address = one.scheduler_address
        for where, folder, said in (
            (address, "other/credentials", "TLS certificate does not match"),
            (address, None, "no credentials: say them by credentials=FOLDER"),
            (address.replace("tls", "tcp"), None, "check the address, tls:// or tcp://"),
            (address, None, "no credentials"),
        ):
            chosen = None if folder is None else tmp_path / folder
            with pytest.raises(OSError, match=said), existing(where, timeout=20, credentials=chosen):
                pass
        for folder, said in ((".", "found no ca.pem"), ("nothing", "expected a folder with the files ca.pem")):
            with pytest.raises(FileNotFoundError, match=said), existing(address, credentials=tmp_path / folder):
                pass
        with (
            pytest.raises(RuntimeError, match=f"found 0 workers at {address}, missing 1"),
            existing(address, ranks=1, timeout=1, credentials=tmp_path / "mine" / "credentials"),
        ):
            pass


def test_a_queue_needs_a_folder_a_known_system_and_its_commands(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected the run's"):
        cluster("slurm")
    with pytest.raises(ValueError, match="expected one of slurm, pbs, htcondor"), job_queue("cobalt", folder=tmp_path):
        pass
    with pytest.raises(ValueError, match="expected one for HTCondor"), job_queue("htcondor", folder=tmp_path):
        pass
    for system in SYSTEMS:
        absent = pytest.raises(ValueError, match=r"found the interface 'ib9' .*; this machine has .*lo")
        with absent, job_queue(system, folder=tmp_path, site=replace(SITE, interface="ib9")):
            pass
    monkeypatch.setenv("PATH", "")
    for system in SYSTEMS:
        missing = pytest.raises(RuntimeError, match="found no command")
        with missing, job_queue(system, folder=tmp_path, site=replace(SITE, interface="lo")):
            pass
    assert list(tmp_path.iterdir()) == []


def test_every_workflow_takes_the_same_argument():
    parser = argparse.ArgumentParser()
    add_cluster(parser)
    assert vars(parser.parse_args([])) == {"cluster": "local", "insecure": False}
    opens = re.compile(r"\b(local|cluster|on_ranks)\(")
    with_one = [path for path in sorted((ROOT / "workflows").glob("*.py")) if opens.search(path.read_text())]
    measure_this_machine = ["bench_checkpoint.py", "bench_inference.py", "bench_view.py"]
    assert [path.name for path in with_one if "add_cluster(" not in path.read_text()] == measure_this_machine


WAITS = "import time\nfrom steering.clusters.own_job import watched_end\nwith watched_end():\n    time.sleep({seconds})"


@pytest.mark.parametrize(("successor", "seconds", "code"), [("8", 60, -signal.SIGTERM), ("", 1, 0)])
def test_a_driver_ends_before_its_job_does_where_another_goes_on(tmp_path, successor, seconds, code):
    end = datetime.fromtimestamp(time.time() + 6).isoformat(timespec="seconds")
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '7|RUNNING|{end}|None'\n")
    squeue.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7", "STEERING_SUCCESSOR": successor}
    done = subprocess.run([sys.executable, "-c", WAITS.format(seconds=seconds)], env=environment, check=False)
    assert done.returncode == code
