"""Laws of checkpoints on disk: whole or not at all, refused in words, and who is alive is left alone."""

import asyncio
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from steering import cli
from steering.learning import RanksPart
from steering.records import Geometry, make_chunk
from steering.runner.again import note_going_on, note_workflow, recoverable
from steering.runner.folder import RunFolder
from steering.runner.lock import DRIVER, RUNNER, held, refuse_held
from steering.runner.manifest import (
    FORMAT,
    LAST,
    Manifest,
    NoCheckpoint,
    checkpoints,
    commit,
    newest_whole,
    prune,
    read_part,
    write_part,
)
from steering.runner.runner import Runner
from steering.runner.spool import drop_spooled, spooled, write_spooled
from tests.test_runner import experiment


@pytest.fixture
def folder(tmp_path):
    workflow = tmp_path / "work.py"
    workflow.write_text("def main(folder, arguments):\n    folder.append_event({'seq': 9, 'event': 'X'})\n")
    folder = RunFolder.create(tmp_path / "run", workflow)
    note_workflow(folder, workflow, ["--ranks", "2"])
    return folder


def write(folder, number, shared=("frames/a.npz",), ranks=None):
    """A checkpoint of two parts and some shared files, and of a part of the ranks."""
    root = checkpoints(folder)
    for name in shared:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).write_bytes(b"x" * 10)
    parts = {name: write_part(root, number, name, {"number": number})[0] for name in ("campaign", "source")}
    if ranks is not None:
        parts["ranks"] = write_part(root, number, "ranks", ranks.to_json())[0]
    files = dict.fromkeys(shared, 10)
    commit(root, Manifest(number=number, event=number, time=time.time(), parts=parts, files=files, bytes=0))
    return root


DAMAGES = {
    "a shared file is gone": lambda root: (root / "frames/b.npz").unlink(),
    "a shared file is cut": lambda root: (root / "frames/b.npz").write_bytes(b"x"),
    "a shared file is a link out of the folder": lambda root: (
        (root / "frames/b.npz").unlink(),
        (root.parent / "ten").write_bytes(b"x" * 10),
        (root / "frames/b.npz").symlink_to(root.parent / "ten"),
    ),
    "a part is gone": lambda root: (root / "2/source.json").unlink(),
    "a part is another one": lambda root: (root / "2/source.json").write_text('{"number": 1}'),
    "the manifest is cut": lambda root: (root / "2/manifest.json").write_text('{"format": "stee'),
    "the manifest is a list": lambda root: (root / "2/manifest.json").write_text("[]"),
    "a field lacks": lambda root: (root / "2/manifest.json").write_text(json.dumps({"format": FORMAT, "number": 2})),
    "the manifest is a pipe": lambda root: ((root / "2/manifest.json").unlink(), os.mkfifo(root / "2/manifest.json")),
    "the manifest leads to what has no end": lambda root: (
        (root / "2/manifest.json").unlink(),
        (root / "2/manifest.json").symlink_to("/dev/zero"),
    ),
    "a part is a pipe": lambda root: ((root / "2/source.json").unlink(), os.mkfifo(root / "2/source.json")),
    "a name leads elsewhere": lambda root: (root / "2/manifest.json").write_text(
        (root / "2/manifest.json").read_text().replace("frames/b.npz", "../workflow.py")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_that_is_said(folder, damage):
    write(folder, 1)
    root = write(folder, 2, ("frames/a.npz", "frames/b.npz"))
    assert newest_whole(folder)[0].number == 2
    DAMAGES[damage](root)
    manifest, [remark] = newest_whole(folder)
    assert manifest.number == 1
    assert remark.startswith("checkpoint 2 cannot be used: ")
    assert read_part(root, manifest, "source") == {"number": 1}
    assert recoverable(folder.path).remarks[0] == remark


def test_one_that_was_being_written_is_none(folder):
    root = write(folder, 1)
    write_part(root, 2, "campaign", {})
    assert newest_whole(folder) == (newest_whole(folder)[0], [])
    assert newest_whole(folder)[0].number == 1


def test_another_format_is_refused_and_nothing_older_is_used_in_its_place(folder):
    write(folder, 1)
    root = write(folder, 2)
    path = root / "2/manifest.json"
    path.write_text(path.read_text().replace(FORMAT, "steering-checkpoint 7"))
    with pytest.raises(ValueError, match="found a checkpoint of format 'steering-checkpoint 7', expected 'steering-ch"):
        recoverable(folder.path)


def test_what_no_kept_checkpoint_names_is_removed(folder):
    write(folder, 1, ("frames/a.npz", "frames/b.npz"))
    write(folder, 2, ("frames/b.npz", "frames/c.npz"))
    root = write(folder, 3, ("frames/c.npz", "frames/d.npz"))
    later = root / "frames/e.npz"
    later.write_bytes(b"of the next one")
    os.utime(later, (time.time() + 10, time.time() + 10))
    prune(root, 2)
    assert sorted(path.name for path in root.iterdir()) == ["2", "3", "frames"]
    assert sorted(path.name for path in (root / "frames").iterdir()) == ["b.npz", "c.npz", "d.npz", "e.npz"]
    assert newest_whole(folder)[0].number == 3
    shutil.rmtree(root / "3")
    assert newest_whole(folder)[0].number == 2


def ranks_part(root, number):
    """What ranks have written, long before any manifest."""
    weights, buffer = (f"ranks/{number:08d}.{name}.safetensors" for name in ("weights", "rank-0.buffer"))
    for name in (weights, buffer):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * 10)
        os.utime(root / name, (1, 1))
    return RanksPart(number=number, step=number, ranks=1, weights=weights, buffers=((buffer,),), samples=(), bytes=20)


def test_what_ranks_write_out_of_turn_stays_until_a_later_part_takes_its_place(folder):
    """At the end of a job they hand over, at the end of the run they leave a last part, while a checkpoint that was
    begun before is committed."""

    def kept():
        return sorted({path.name.split(".")[0] for path in (root / "ranks").iterdir()})

    root = checkpoints(folder)
    first, _ = (ranks_part(root, number) for number in (3, 4))
    draft = root / "ranks/00000005.rank-0.buffer.safetensors.part"
    draft.write_bytes(b"")
    os.utime(draft, (1, 1))
    write(folder, 1, first.files, first)
    prune(root, 1)
    assert kept() == ["00000003", "00000004", "00000005"]
    last, second = (ranks_part(root, number) for number in (6, 7))
    (root / LAST).write_text(json.dumps(last.to_json()))
    write(folder, 2, second.files, second)
    prune(root, 1)
    assert kept() == ["00000006", "00000007"]
    assert newest_whole(folder)[0].number == 2


def test_a_link_among_the_folders_of_a_checkpoint_is_not_pruned_through(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").write_text("")
    os.utime(tmp_path / "mine/letter", (1, 1))
    root = write(folder, 1)
    for name in ("more", "ranks"):
        (root / name).symlink_to(tmp_path / "mine")
    prune(root, 1)
    assert (tmp_path / "mine/letter").exists()


def test_a_run_that_cannot_go_on_is_refused_in_words(folder, capsys):
    def refusal():
        assert cli.main(["recover", str(folder.path)]) == 1
        return capsys.readouterr().err

    assert "found no checkpoint, expected one in" in refusal()
    with pytest.raises(NoCheckpoint):
        newest_whole(folder)
    write(folder, 1)
    with held(folder, RUNNER):
        assert f"found a run that is alive (its runner is process {os.getpid()} on" in refusal()
    folder.write_summary({"status": "failed"})
    assert recoverable(folder.path).checkpoint == 1, "as after the loss of a scheduler"
    folder.write_summary({"status": "finished"})
    assert "found a run that is finished, expected one that was killed before its end" in refusal()
    assert cli.main(["recover", str(folder.path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_run_that_could_not_go_on_says_what_it_said_before(folder):
    folder.end("failed", "found no beam")
    before = folder.summary()
    with pytest.raises(NoCheckpoint):
        asyncio.run(Runner(experiment(), RunFolder(folder.path, recovering=True)).run())
    assert folder.summary() == before


def test_a_workflow_runs_again_with_its_own_arguments_or_others(folder, capsys, monkeypatch):
    write(folder, 1)
    monkeypatch.chdir(folder.path.parent)
    given = []
    (folder.path.parent / "work.py").write_text("def main(folder, arguments): raise SystemExit(str(arguments))\n")
    begun = recoverable(folder.path)
    assert begun.workflow == folder.path / "workflow.py"  # the file was changed since
    assert "was changed since: the run goes on with its copy" in begun.remarks[0]
    assert begun.arguments == ("--ranks", "2")
    (folder.path / "workflow.py").write_text((folder.path.parent / "work.py").read_text())
    for more, said in (([], "['--ranks', '2']"), (["--", "--ranks", "3"], "['--ranks', '3']")):
        assert cli.main(["recover", "run", *more]) == 1
        given.append(capsys.readouterr().err)
        assert said in given[-1]
        assert "was not continued, and is as it was" in given[-1]  # and can be recovered still


PARSES = """
import argparse

def main(folder, arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int)
    parser.parse_args(arguments)
    raise RuntimeError("no worker came")
"""


def test_a_run_that_does_not_go_on_keeps_its_status_and_its_arguments(folder, capsys):
    """The workflow's own help, a mistyped option and what fails before the checkpoint is read change nothing."""
    write(folder, 1)
    (folder.path / "workflow.py").write_text(PARSES)
    folder.write_summary({"status": "failed", "reason": "its scheduler was lost", "pid": 7})

    def contents():
        return {path.name: path.read_bytes() for path in folder.path.iterdir() if path.suffix in (".json", ".html")}

    before = contents()
    for words, code, said in (
        (["--help"], 0, "was not continued, and is as it was\n"),
        (["--", "--rank3"], 2, "and is as it was: left with 2"),
        (["--", "--ranks", "3"], 1, "and is as it was: no worker came"),
    ):
        assert cli.main(["recover", str(folder.path), *words]) == code
        assert said in capsys.readouterr().err
        assert contents() == before


def test_a_run_that_python_has_started_is_not_said_to_be_continued_by_a_command(tmp_path, capsys):
    """Neither one of a notebook nor one that a process of its own was handed."""
    folder = RunFolder.create(tmp_path / "run")
    write(folder, 1)
    note_workflow(folder, tmp_path / "-", ["--insecure"])
    folder.write_summary({"pid": 2**22 + 1})  # no process has this number
    call = f'continue with `run(experiment, client, RunFolder("{folder.path}", recovering=True))` in Python'
    assert cli.main(["status", str(folder.path)]) == 0
    assert call in capsys.readouterr().out
    assert cli.main(["recover", str(folder.path)]) == 1
    assert call in " ".join(capsys.readouterr().err.split())


def test_other_arguments_hold_once_the_run_goes_on(folder):
    write(folder, 1)
    going = RunFolder(folder.path, recovering=True)
    note_workflow(going, folder.path.parent / "work.py", ["--ranks", "3"])
    assert recoverable(folder.path).arguments == ("--ranks", "2")
    note_going_on(going)
    assert recoverable(folder.path).arguments == ("--ranks", "3")
    note_going_on(going)  # another runner, for the same driver
    assert recoverable(folder.path).arguments == ("--ranks", "3")


def test_a_lock_dies_with_its_holder(folder):
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with held(folder, DRIVER):
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(RuntimeError, match=f"its driver is process {child} on .*`steering status`"):
        refuse_held(folder)
    with pytest.raises(RuntimeError, match="is alive"), held(folder, DRIVER):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    refuse_held(folder)
    with held(folder, DRIVER), held(folder, RUNNER):
        pass
    mine = folder.path.parent / "mine"
    (folder.path / ".driver.lock").rename(mine)
    mine.write_text("a letter")
    (folder.path / ".driver.lock").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic link"), held(folder, DRIVER):
        pass
    assert mine.read_text() == "a letter"


def test_spooled_frames_come_back_and_go_when_no_checkpoint_needs_them(tmp_path):
    chunks = [*beamline_chunks("a", 0), *beamline_chunks("b", 20)]
    for chunk in chunks:
        write_spooled(tmp_path / "spool", chunk)
    (tmp_path / "spool/000000000003.npz").write_bytes(b"PK torn")
    found = list(spooled(tmp_path / "spool"))
    assert [chunk.attrs for chunk in found] == [chunk.attrs for chunk in chunks]
    for one, other in zip(found, chunks, strict=True):
        assert one.equals(other)
    drop_spooled(tmp_path / "spool", time.time() - 100)
    assert len(list(spooled(tmp_path / "spool"))) == len(chunks)
    drop_spooled(tmp_path / "spool", time.time() + 100)
    assert list(spooled(tmp_path / "spool")) == []
    assert list(spooled(None)) == []


def beamline_chunks(scan, first):
    counts = np.random.default_rng(first).poisson(9, (10, 16, 16)).astype(np.uint16)
    geometry = Geometry(shape=(16, 16), wavelength=1e-10, distance=2.0, detector_pixel=75e-6)
    for k in (0, 5):
        part = make_chunk(counts[k : k + 5], range(first + k, first + k + 5), np.ones((5, 2)), geometry, scan=scan)
        part.attrs["visit_of"] = "earlier"
        yield part
