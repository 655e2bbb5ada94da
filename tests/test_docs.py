"""The documentation: every command and every code block of docs/ is run, page by page, in a folder of its own.

A block that says `<!-- not run: REASON -->` before its fence needs what a test has not; its syntax, its names and its
arguments are checked. `<!-- small: ARGUMENTS -->` are arguments that only the test adds, so that it takes seconds. What
is shown below a command is what it prints, `...` for anything. A page that goes on from another one says so in its
first lines, and runs after it in the same folder.
"""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import steering
from steering import cli
from steering.commands import detach
from tests.browser import CHROMIUM, browser
from tests.command_line import said

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).with_suffix("").as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
FENCE = re.compile(r"^( *)```(\w*)(?: +title=\"([^\"]+)\")?$")
MARK = re.compile(r"^<!-- (not run|small): (.+) -->$")
ELLIPSIS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SLOW = {"tutorials/laptop", "tutorials/recorded-scan", "tutorials/own-network"}
PROGRAMS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "steering": [sys.executable, "-m", "steering.cli"],
}

_spec = importlib.util.spec_from_file_location("generate", DOCS / "reference" / "generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@dataclass(frozen=True)
class Block:
    where: str
    """PAGE:LINE of the first line of its text."""
    language: str
    title: str
    mark: str
    """What is said before it: `not run`, `small` or nothing."""
    note: str
    text: str


def blocks(page):
    found, mark, opened, lines, indent = [], ("", ""), None, [], ""
    for number, line in enumerate(PAGES[page].read_text().splitlines(), 1):
        if opened is not None:
            if line.strip() == "```":
                found.append(Block(*opened, "".join(lines)))
                mark, opened = ("", ""), None
            else:
                lines.append(line.removeprefix(indent) + "\n")
        elif line.lstrip().startswith("```"):
            fence = FENCE.match(line)
            assert fence, f"{page}:{number}: found {line!r}, expected ```LANGUAGE title=..."
            indent, language, title = fence.groups()
            opened, lines = (f"{page}:{number + 1}", language, title or "", *mark), []
        elif line.startswith("<!--") and not generate.MARK.match(line):
            marked = MARK.match(line)
            assert marked, f"{page}:{number}: found {line!r}, expected one of not run, small"
            mark = marked.groups()
        elif line.strip():
            assert mark == ("", ""), f"{page}:{number}: found text, expected the block that {mark} is said of"
    assert opened is None, f"{page}: a block that does not end"
    return found


def commands(block):
    """(command, what it shows) of a console block."""
    found = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"{block.where}: found {line!r}, expected a command after $"
            found[-1][1].append(line)
    return found


def goes_on_from(page):
    """The page that this one says it goes on from, or None."""
    said_so = re.search(r"^\*This page goes on from \[[^\]]+\]\(([^)]+)\.md\)", PAGES[page].read_text(), re.MULTILINE)
    return said_so and (PAGES[page].parent / said_so[1]).resolve().relative_to(DOCS).as_posix()


def chains():
    """Pages that run one after the other in one folder."""
    first = [page for page in PAGES if goes_on_from(page) is None]
    return [[page, *(later for later in PAGES if goes_on_from(later) == page)] for page in first]


RUN = [chain for chain in chains() if any(blocks(page) for page in chain)]


@pytest.mark.parametrize(
    "chain", [pytest.param(chain, id=chain[0], marks=[pytest.mark.slow] * (chain[0] in SLOW)) for chain in RUN]
)
def test_what_a_page_shows_can_be_done(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(ROOT / "workflows", "workflows", ignore=shutil.ignore_patterns("__pycache__"))
    loaded = set(sys.modules)
    try:
        for page in chain:
            names = {"__name__": "__main__"}
            for block in blocks(page):
                do(block, names)
    finally:
        for name in set(sys.modules) - loaded:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]


def do(block, names):
    """Run a block, or check it."""
    run = block.mark != "not run"
    if block.title:
        Path(block.title).write_text(block.text)
    if block.language == "python":
        program = compile(block.text, block.where, "exec")
        if run and not block.title:
            with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
                exec(program, names)
        elif not run:
            look_up(block)
    elif block.language == "console":
        for command, shown in commands(block):
            if run:
                compare(f"{block.where}: {command}", shown, execute(command, block.note))
            else:
                check(block, command)
    elif block.language == "toml":
        tomllib.loads(block.text)
    else:
        assert block.language == "text", f"{block.where}: found {block.language!r}, expected a language that is run"


def look_up(block):
    """The names that a block imports, or takes from steering, are there."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], block.where
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "steering":
            assert hasattr(steering, node.attr), f"{block.where}: found no steering.{node.attr}"


def execute(command, more):
    """What a command prints. more: arguments for a workflow."""
    words = shlex.split(command)
    if words[0] == "steering" and "--detach" not in words:  # what is detached stays when the command has ended
        return said(*words[1:], *(shlex.split(more) if words[1] == "run" else []))[0]
    given = shlex.join([*PROGRAMS[words[0]], *words[1:]]) if words[0] in PROGRAMS else command
    done = subprocess.run(["bash", "-c", given], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compare(where, shown, printed):
    wanted = "\n".join(shown) + "\n"
    right = not shown or doctest.OutputChecker().check_output(wanted, printed, ELLIPSIS)
    assert right, f"{where}\nthe page shows\n{wanted}\nit prints\n{printed}"


def check(block, command):
    """A command that is not run: its shell syntax, and its arguments where a parser of ours, or make, takes them."""
    assert block.note.strip(), f"{block.where}: expected a reason"
    subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True)
    words = shlex.split(command)
    try:
        if words[0] == "steering":
            chosen = cli.parser().parse_args(words[1:])
            workflow = ROOT / getattr(chosen, "workflow", "none")
            if workflow.is_file():
                rest = detach.take_flags(chosen, cli.taken_out(chosen.arguments)[1])
                generate.parser_of(workflow).parse_args(rest)
    except SystemExit as ending:
        pytest.fail(f"{block.where}: {command}: the arguments are not taken ({ending})")
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block.where}: {command}: {done.stderr}"
    ours = [word for word in words if word.startswith(("workflows/", "tests/", "notebooks/"))]
    assert [word for word in ours if not (ROOT / word).exists()] == [], block.where


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_outside(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix(): path for path in tmp_path.rglob("*.html")}
    assert set(PAGES) <= set(pages)
    reference = "".join(path.read_text() for name, path in pages.items() if name.startswith("reference/"))
    for name in ("steering recover", "--orientation", *(set(steering.__all__) - {"__version__"})):
        assert name in reference
    loads = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)")
    assert {name: found for name, path in pages.items() if (found := loads.findall(path.read_text()))} == {}
    switched = ("js/darkmode.js", 'id="hljs-light"', 'id="hljs-dark"')
    assert [name for name in PAGES if any(one not in pages[name].read_text() for one in switched)] == []
    if CHROMIUM is not None and importlib.util.find_spec("playwright") is not None:
        chooses_dark(tmp_path / "index.html")


def chooses_dark(page):
    """By the menu of a page that is read as a file."""
    with browser() as started:
        opened, wrong = started.new_context(color_scheme="light").new_page(), []
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.goto(page.as_uri())
        assert opened.get_attribute("html", "data-bs-theme") == "light"
        opened.click("#theme-menu")
        opened.click("[data-bs-theme-value=dark]")
        assert opened.get_attribute("html", "data-bs-theme") == "dark"
        assert [error for error in wrong if "search/worker.js" not in error] == [], "search needs a server"


def test_files_that_pages_name_are_there():
    for page, path in PAGES.items():
        named = re.findall(r"`((?:workflows|tests|notebooks|docs|steering)/[\w./-]+)`", path.read_text())
        named += re.findall(r"(?:tests|notebooks)/\w+\.(?:py|ipynb)", path.read_text())
        assert [name for name in named if not (ROOT / name).exists()] == [], page
