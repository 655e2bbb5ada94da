"""What somebody needs who has just installed it: the demo, the doctor, completion, and how it is packaged."""

import re
import shutil
import socket
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from steering.commands.start_here import spelt_out
from steering.learning.hardware import Hardware
from steering.loading import shipped
from steering.runner.doctor import DEVELOPERS, GIB, PURPOSES, Machine, examine, filesystem, find_extras, findings
from tests.command_line import said

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

HARDWARE = Hardware(cores=8, memory_bytes=30 * GIB, torch="2.13.0", cuda=None, bfloat16=True)
GPUS = replace(HARDWARE, cuda="13.0", gpus=("A100", "A100"), devices=2, nccl="2.27.3")
SOUND = Machine(
    hardware=HARDWARE,
    folder=Path("/data/runs"),
    disk_bytes=100 * GIB,
    filesystem="lustre",
    scratch=Path("/tmp"),
    scratch_bytes=10 * GIB,
    open_files=1024,
    extras=("onnx",),
)


def sentences(machine, kind):
    return [one.sentence for one in findings(machine) if one.kind == kind]


def test_a_sound_machine_is_described_and_nothing_would_stop_a_run():
    assert sentences(SOUND, "STOPS") == []
    assert sentences(SOUND, "note") == []
    assert sentences(SOUND, "has") == [
        "8 cores, 30.0 GiB of free memory, torch 2.13.0",
        "no GPU: networks are trained and predict on the CPU",
        "100.0 GiB free in /data/runs",
        "a shared file system (lustre): jobs on other machines see the run's folder",
        "no network interface but the loopback",
        "extras: onnx",
    ]
    assert "2 GPU: A100, A100; CUDA 13.0" in sentences(replace(SOUND, hardware=GPUS), "has")
    assert "NCCL 2.27.3: ranks with a GPU each exchange from GPU to GPU" in sentences(
        replace(SOUND, hardware=GPUS), "has"
    )


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"hardware": None, "broken": "libcudart.so.13: cannot open"}, "STOPS", "torch cannot be loaded (libcudart.so"),
        ({"hardware": replace(HARDWARE, memory_bytes=GIB)}, "STOPS", "1.0 GiB of free memory, and the demo alone"),
        ({"hardware": replace(GPUS, nccl=None)}, "STOPS", "several GPUs and a torch without NCCL"),
        ({"refused": "Permission denied"}, "STOPS", "/data/runs: nothing can be written there (Permission denied)"),
        ({"disk_bytes": GIB // 10}, "STOPS", "0.1 GiB free, and a run needs 0.5 GiB and more: make room"),
        ({"unlocked": "No locks available"}, "STOPS", "no file can be locked there (No locks available)"),
        ({"scratch_bytes": 0}, "STOPS", "0.0 GiB free in /tmp, where processes keep what they send: set TMPDIR"),
        ({"loopback": "Operation not permitted"}, "STOPS", "no port can be opened on 127.0.0.1 (Operation not"),
        ({"open_files": 64}, "STOPS", "64 files may be open at once, and a run needs 256"),
        ({"hardware": replace(HARDWARE, cores=1)}, "note", "1 core: prediction and training take turns"),
        ({"hardware": replace(HARDWARE, devices=4)}, "note", "4 GPU of which torch 2.13.0 uses none, since it was"),
        ({"hardware": replace(GPUS, gpus=())}, "note", "2 GPU of which torch sees none: look at CUDA_VISIBLE_DEVICES"),
        ({"hardware": replace(HARDWARE, bfloat16=False)}, "note", "a processor without bfloat16"),
        ({"disk_bytes": 2 * GIB}, "note", "2.0 GiB free: checkpoints and images of a long scan may need more"),
        ({"filesystem": "ext4"}, "note", "a file system of this machine (ext4): where jobs run on other machines"),
        ({"queues": ("sbatch",), "missing": ("jobqueue",)}, "note", "a batch system, and not what submits its jobs"),
        ({"missing": ("dectris",)}, "note", "without Dectris stream2, and positions over ZMQ: pip install 'steering"),
        ({"queues": ("sbatch",)}, "has", "SLURM (sbatch)"),
        ({"hardware": replace(HARDWARE, interfaces=(("ib0", "10.1.0.2"), ("lo", "127.0.0.1")))}, "has", "ib0 10.1.0.2"),
    ],
)
def test_what_a_machine_lacks_is_said_with_what_to_do(changed, kind, says):
    added = set(sentences(replace(SOUND, **changed), kind)) - set(sentences(SOUND, kind))
    assert any(says in sentence for sentence in added), added


def test_the_doctor_looks_at_this_machine_and_leaves_nothing(tmp_path, monkeypatch):
    out, _ = said("doctor", tmp_path / "runs", code=None)
    assert re.search(r"\d+ cores?, \d+\.\d GiB of free memory, torch 2", out)
    assert str(tmp_path / "runs") in out
    assert list(tmp_path.iterdir()) == []
    machine = examine(tmp_path)
    assert (machine.refused, machine.unlocked, machine.loopback) == ("", "", "")
    assert machine.disk_bytes > 0

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    out, _ = said("doctor", tmp_path, code=1)
    assert "nothing can be written there (Operation not permitted)" in out
    assert "no port can be opened on 127.0.0.1 (Operation not permitted)" in out


def test_a_file_system_is_that_of_the_deepest_mount():
    mounts = "/dev/a / ext4 rw 0 0\nnode:/x /data nfs4 rw 0 0\nnone /data/my\\040runs tmpfs rw 0 0\n"
    assert filesystem(Path("/data/one"), mounts) == "nfs4"
    assert filesystem(Path("/data/my runs/a"), mounts) == "tmpfs"
    assert filesystem(Path("/database"), mounts) == "ext4"
    assert filesystem(Path("/x"), "") == ""


def test_the_doctor_says_of_extras_what_they_are_for():
    extras = set(PROJECT["optional-dependencies"]) - set(DEVELOPERS)
    assert set(PURPOSES) <= extras
    assert "onnx" in find_extras()


def test_the_demo_is_the_first_workflow():
    assert shipped() == ROOT / "workflows"
    assert spelt_out(["demo", "--ranks", "1"]) == ["run", str(ROOT / "workflows/simulated_drift.py"), "--ranks", "1"]
    assert spelt_out(["--log", "json", "demo"])[:3] == ["--log", "json", "run"]
    assert spelt_out(["--log=json", "demo"])[:2] == ["--log=json", "run"]
    assert spelt_out(["status", "demo"]) == ["status", "demo"]
    out, _ = said("demo", "--help")
    assert "usage: steering run simulated_drift.py" in re.sub(r"run \S*/", "run ", out)


def test_a_workflow_that_comes_along_is_found_from_any_folder_unless_one_of_that_name_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "usage: " in said("run", "workflows/bench_scaling.py", "--help")[0]
    assert "workflows/nothing.py: found no such file" in said("run", "workflows/nothing.py", code=1)[1]
    assert "bench_scaling.py: found no such file" in said("run", "elsewhere/bench_scaling.py", code=1)[1]
    (tmp_path / "workflows").mkdir()
    own = tmp_path / "workflows" / "bench_scaling.py"
    own.write_text('def main(folder, arguments):\n    print("my own")\n')
    assert "my own" in said("run", "--out", tmp_path / "run", "workflows/bench_scaling.py")[0]


def test_a_shell_completes_commands_options_and_folders(tmp_path):
    """By bash itself."""
    pytest.importorskip("shtab", reason="completion needs shtab: pip install 'steering[completion]'")
    script = tmp_path / "steering.bash"
    script.write_text(said("completion", "bash")[0])
    (tmp_path / "runs").mkdir()
    for words, expected in (
        (["steering", "rec"], {"record", "recover"}),
        (["steering", "memory", "p"], {"prune"}),
        (["steering", "run", "--mem"], {"--memory"}),
        (["steering", "status", "ru"], {"runs"}),
    ):
        line = " ".join(words)
        complete = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
            f"COMP_POINT={len(line)}; $(complete -p steering | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", complete], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert set(done.stdout.split()) == expected, (line, done.stderr)
    assert "#compdef steering" in said("completion", "zsh")[0]


def test_the_citation_says_what_the_project_says():
    yaml = pytest.importorskip("yaml", reason="reading CITATION.cff needs PyYAML")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= cited.keys()
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])
    assert cited["references"][0]["doi"] in (ROOT / "docs" / "explanation" / "methods.md").read_text("utf-8")


def test_every_image_is_made_by_the_one_install_script():
    for recipe in ("Dockerfile", "steering.def"):
        text = (ROOT / "containers" / recipe).read_text("utf-8")
        assert "sh /src/containers/install.sh /opt/steering" in text
        assert "pip install" not in text
    assert "ARG BASE=" in (ROOT / "containers" / "Dockerfile").read_text("utf-8")


def test_the_apptainer_definition_does_what_the_dockerfile_does(tmp_path):
    """As text and by a shell: Apptainer itself is in no package index that the tests use, so nothing here builds it."""
    text = (ROOT / "containers" / "steering.def").read_text("utf-8")
    docker = (ROOT / "containers" / "Dockerfile").read_text("utf-8")
    header, *rest = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = {name: textwrap.dedent(body) for name, body in zip(rest[::2], rest[1::2], strict=True)}
    assert {"Bootstrap: docker", "From: {{ BASE }}"} <= set(header.splitlines())
    assert list(sections) == ["arguments", "files", "post", "environment", "runscript", "test"]
    assert sections["arguments"].strip() == re.search(r"^ARG (BASE=.+)$", docker, re.MULTILINE)[1]
    copied = {}
    for line in re.findall(r"^COPY (.+)$", docker, re.MULTILINE):
        *sources, into = line.split()
        copied |= {name: f"{into}{name}" if into.endswith("/") else into for name in sources}
    assert dict(line.split() for line in sections["files"].split("\n") if line) == copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert re.search(r"^ENV (PATH=\S+)$", docker, re.MULTILINE)[1] in sections["environment"]
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n", "-c", sections[name]], check=True)
    (tmp_path / "steering").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "steering").chmod(0o755)
    there = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for given, wanted in ((["doctor", "/a b"], "doctor /a b\n"), ([], "demo\n")):
        command = ["sh", "-c", sections["runscript"], "runscript", *given]
        assert subprocess.run(command, env=there, check=True, capture_output=True, text=True).stdout == wanted
    assert docker.endswith('ENTRYPOINT ["steering"]\nCMD ["demo"]\n')


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_the_workflows(tmp_path):
    """Built as pip builds it, from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools of 77 or newer")
    copy = tmp_path / "copy"
    wanted = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
    for name in ("steering", "workflows"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in wanted:
        shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    [wheel] = (copy / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    for name in ("steering", "workflows"):
        inside = tmp_path / "installed" / ("steering/workflows" if name == "workflows" else name)
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (inside / file.relative_to(ROOT / name)).is_file(), file
    where = "import sys; sys.path.insert(0, '.'); from steering.loading import shipped; print(shipped())"
    done = subprocess.run(
        [sys.executable, "-I", "-c", where], cwd=tmp_path / "installed", check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "installed" / "steering" / "workflows")
