"""Laws of the runner that need a cluster: a rank that dies, a person's command, a second campaign beside the first."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed as dist
from skimage import data as pictures

from steering.campaign import CampaignSettings, Limits
from steering.clusters import local
from steering.learning import Reconstruction, TrainerSettings
from steering.learning.strategies import ER
from steering.models import ProbeFirst
from steering.policies import SpaceFilling
from steering.ptychography import RefineSettings, patch_weight, zone_plate
from steering.records import Field
from steering.runner import Experiment, FinalSettings, LabelSettings, RunFolder, on_ranks, start
from steering.sources import SimulatedBeamline, Stage, sample
from steering.view.status import status_lines
from tests.command_line import said

pytestmark = pytest.mark.slow


def experiment(frames=150, *, rate=80.0, step=None, **settings):
    """One small sample, two ranks."""
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    stages = [Stage("brick", sample(pictures.brick(), phase=-2.0, absorption=0.1, size=128), frames)]
    source = SimulatedBeamline(stages, probe=probe, step=step or (2.0 if frames > 200 else 5.0), frame_rate=rate)
    network = ProbeFirst(window=64, patch=40, width=8)
    return Experiment(
        source=source,
        policy=SpaceFilling(source.candidates),
        network=network,
        strategy=ER(Reconstruction(patch_weight(probe, 40))),
        trainer=TrainerSettings(batch=4, candidates=2, representatives=4, deadline=10.0),
        campaign=CampaignSettings(steps=10, **settings),
        scans=("brick",),
    )


def told(folder, name):
    """Events of a name in the log."""
    return [event for event in folder.events() if event["event"] == name]


@pytest.fixture(scope="module")
def two_ranks():
    with local(ranks=2) as client:
        yield client


def wait_for(folder, name, run):
    """Until the log has such an event."""
    while not told(folder, name):
        assert not run.done, run.result()
        time.sleep(0.05)


def test_decisions_stay_inside_the_field_of_the_source_unless_another_area_is_set():
    parts = experiment()
    assert parts.safe_campaign.limits.area == parts.source.field
    own = Field(0.0, 1e-8, 0.0, 1e-8)
    assert experiment(limits=Limits(area=own)).safe_campaign.limits.area == own


def test_the_campaign_goes_on_when_a_rank_is_killed(tmp_path):
    """kill -9 of rank 0 of two: the other goes on, with its weights and all held-out frames, alone until a new one has
    joined; no frame is lost.

    Nor does the run end where the last refinement fails, here by an engine that is not installed."""
    folder = RunFolder.create(tmp_path / "run")
    labels = LabelSettings(final=FinalSettings(refine=RefineSettings(engine="ptychi", passes=1)))
    with local(ranks=2) as client:
        run = start(replace(experiment(rounds_after_end=8, gain=0.0), labels=labels), client, folder)
        wait_for(folder, "CandidateReady", run)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        home = next(address for address, worker in workers.items() if worker["name"] == "trainer-0")
        os.kill(client.run(os.getpid, workers=[home])[home], signal.SIGKILL)
        figures = run.result()
    change = told(folder, "GroupChanged")[0]
    assert (change["lost"], change["ranks"]) == ([0], 1 + len(change["joined"]))
    candidates = [event for event in told(folder, "CandidateReady") if event["time"] > change["time"]]
    assert candidates
    assert all(event["error"] is not None for event in candidates)  # the frames to judge by are still there
    assert any(event["time"] > change["time"] for event in told(folder, "ModelPublished"))
    assert figures["ranks_lost"] == 1
    assert figures["ranks"] == 1 + figures["ranks_joined"]
    assert figures["frames_predicted"] == figures["frames_acquired"] == 150
    [refined] = told(folder, "ScanRefined")
    if find_spec("ptychi") is None:
        assert "found no working Pty-Chi" in refined["reason"] == figures["final_refinement"]["brick"]["reason"]
        [failed] = told(folder, "WorkFailed")
        assert (failed["what"], failed["error"]) == ("the last refinement of brick", refined["reason"])
        assert folder.objects()["brick"].attrs["refinement"] == "as time allowed while the scan was measured"


def test_pause_resume_and_stop(tmp_path):
    """A paused campaign asks for no further positions; a stop ends the run well, with what there is."""
    folder = RunFolder.create(tmp_path / "run")
    with local(ranks=1) as client:
        parts = experiment(frames=5000)
        run = start(Experiment(**{**vars(parts), "ranks": 1}), client, folder)
        wait_for(folder, "PredictionReady", run)
        run.command("pause")
        wait_for(folder, "Command", run)
        acquired = -1
        while acquired != (acquired := run.snapshot()["frames_acquired"]):
            time.sleep(1.0)  # what was asked for before the pause is still measured
        run.command("resume")
        while run.snapshot()["frames_acquired"] <= acquired:
            time.sleep(0.1)
        run.command("stop")
        figures = run.result()
    assert acquired < figures["frames_acquired"] < 5000
    assert figures["frames_predicted"] == figures["frames_acquired"]


def word_from_elsewhere(name, folder):
    """What a command of a process of its own has said."""
    command = [sys.executable, "-m", "steering.cli", name, str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_person_takes_part_from_another_process(tmp_path):
    """Decisions wait for a word, limits hold, an older model comes back, and the run ends when it is told to."""
    folder = RunFolder.create(tmp_path / "run")
    limits = Limits(area=Field(-1e-7, 1e-7, -1.0, 1.0))  # 100 nm up and down of a field of 280 nm
    with local(ranks=1) as client:
        parts = experiment(frames=5000, approval_s=300.0, unanswered="veto", limits=limits)
        run = start(Experiment(**{**vars(parts), "ranks": 1}), client, folder)
        wait_for(folder, "DecisionProposed", run)
        assert told(folder, "DecisionLimited")[0]["reason"] == "outside the allowed area"
        assert any("approve or veto" in line for line in status_lines(folder))
        assert "positions" in said("veto", folder.path)[0]
        while len(told(folder, "DecisionProposed")) < 2:
            time.sleep(0.05)
        assert not told(folder, "ChunkArrived")  # vetoed: nothing was measured
        while not any(event["version"] for event in told(folder, "ModelPublished")):
            waits = any("approve or veto" in line for line in status_lines(folder))
            if waits and run.snapshot()["frames_acquired"] < 100:  # of some 350: the scan goes on
                run.command("approve")
            time.sleep(0.05)
        assert "nothing more is decided until `steering resume`" in said("pause", folder.path)[0]
        assert any("paused: continue with" in line for line in status_lines(folder))  # in the log before the answer is
        assert "it is paused already" in said("pause", folder.path)[0]
        assert "expected one of" in said("rollback", folder.path, "--version", 99, code=1)[1]
        assert re.match(r"rollback: version \d+ comes back into service in place", said("rollback", folder.path)[0])
        wait_for(folder, "RolledBack", run)
        assert "y -1e-07 to 0, x 0 to 1, beside the workflow's" in said("limit", folder.path, "--area=-1e-7,0,0,1")[0]
        assert any("  limits   y -1e-07 to 0, x 0 to 1, by " in line for line in status_lines(folder))
        assert "a person's limits are lifted" in said("limit", folder.path)[0]
        assert not any("  limits " in line for line in status_lines(folder))
        assert "what was measured is kept, and the report is written" in word_from_elsewhere("stop", folder)
        figures = run.result()
    folder.end("finished")
    assert np.abs(folder.objects()["brick"]["position_y"]).max() <= 1.0001e-7
    assert figures["frames_predicted"] == figures["frames_acquired"] > 0
    assert "expected one that goes on" in said("pause", folder.path, code=1)[1]


def test_a_cluster_with_too_few_ranks_is_refused_in_words(two_ranks, tmp_path):
    run = start(replace(experiment(), ranks=3), two_ranks, RunFolder.create(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="missing 1 with the resource trainer"):
        run.result()


def sum_of_ranks(place, summands):
    """One collective over all ranks."""
    place.join(device="cpu")
    total = torch.tensor(float(summands[place.rank]))
    dist.all_reduce(total)
    return place.rank, float(total)


def one_fails(place):
    """The last rank breaks; the others say where they are."""
    if place.rank == place.ranks - 1:
        raise ZeroDivisionError("this rank broke")
    return place.rank


def test_a_function_runs_on_all_ranks_at_once_and_an_error_comes_back(two_ranks):
    assert on_ranks(two_ranks, sum_of_ranks, [3, 4], ranks=2) == [(0, 7.0), (1, 7.0)]
    assert on_ranks(two_ranks, sum_of_ranks, [3, 4], ranks=1) == [(0, 3.0)]
    with pytest.raises(ZeroDivisionError, match="this rank broke"):
        on_ranks(two_ranks, one_fails, ranks=2)
    with pytest.raises(RuntimeError, match="found 2 workers with the resource trainer, expected 3"):
        on_ranks(two_ranks, sum_of_ranks, [3, 4], ranks=3)
