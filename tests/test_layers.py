"""The walls of the house: which module may import which, and how long anything may be.

Every import of every module is read from its source, also those inside functions and those only for types, because a
wall that types may cross is a door. Nothing is imported to find out.
"""

import argparse
import ast
import itertools
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from steering.cli import main, taken_out
from steering.commands.detach import take_flags

ROOT = Path(__file__).parents[1]

FLOORS = {
    "logs": 1,
    "records": 1,
    "files": 1,
    "ptychography": 2,
    "models": 3,
    "policies": 3,
    "campaign": 3,
    "learning": 4,
    "inference": 4,
    "sources": 5,
    "clusters": 5,
    "labels": 5,
    "runner": 6,
    "view": 7,
    "loading": 7,
    "commands": 8,
    "cli": 9,
    "steering": 10,  # the package itself hands out names of every room, and no room imports it
}

# Rooms or modules in which a library may be imported; libraries that are not named here are refused.
ANYWHERE = ("steering",)
HOMES = {
    "numpy": ANYWHERE,
    "xarray": ANYWHERE,
    "torch": ("steering.ptychography", "steering.models", "steering.learning", "steering.inference"),
    "safetensors": ("steering.models", "steering.learning"),
    "ptychi": ("steering.ptychography",),
    "skimage": ("steering.sources",),
    "h5py": (
        "steering.files",
        "steering.sources.bluesky",
        "steering.sources.swmr_file",
        "steering.sources.swmr_rows",
        "steering.sources.compression",
    ),
    "hdf5plugin": (
        "steering.files",
        "steering.sources.bluesky",
        "steering.sources.swmr_rows",
        "steering.sources.compression",
    ),
    "scipy": ("steering.files.array_file",),
    "tifffile": ("steering.files.export",),
    "p4p": ("steering.sources.pva_client",),
    "PIL": ("steering.sources.pva",),
    "zmq": ("steering.sources.zmq_socket",),
    "cbor2": ("steering.sources.dectris",),
    "bluesky": ("steering.sources.bluesky_plan",),
    "ophyd_async": ("steering.sources.bluesky_plan",),
    "tiled": ("steering.view.tiled",),
    "dask": ("steering.runner", "steering.clusters", "steering.view"),
    "distributed": ("steering.runner", "steering.clusters", "steering.view"),
    "dask_jobqueue": ("steering.clusters.queue",),
    "cryptography": ("steering.clusters.credentials",),
    "rich": ("steering.view", "steering.cli"),
    "matplotlib": ("steering.view", "steering.cli"),
    "IPython": ("steering.view", "steering.cli"),
    "bokeh": ("steering.view.live",),
    "tornado": ("steering.view.live",),
    "psutil": ("steering.learning.group", "steering.learning.hardware"),
    "prometheus_client": ("steering.runner.prometheus",),
    "tensorboard": ("steering.runner.tensorboard",),
    "cloudpickle": ("steering.inference.policy_host", "steering.loading"),
    "shtab": ("steering.commands.start_here",),
    "onnx": ("steering.inference.backends.onnx",),
    "onnxruntime": ("steering.inference.backends.onnx",),
}
# where the name to install is another one
DISTRIBUTIONS = {
    "prometheus_client": "prometheus-client",
    "dask_jobqueue": "dask-jobqueue",
    "ophyd_async": "ophyd-async",
    "skimage": "scikit-image",
    "IPython": "ipykernel",
    "PIL": "pillow",
    "zmq": "pyzmq",
}

FUNCTION_LINES, PARAMETERS, MODULE_LINES, MEDIAN_MODULE_LINES = 60, 8, 400, 150

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One import: the module that is reached, as precisely as the source says, and where it stands."""

    importer: str
    target: str
    where: str


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(root: Path, package: str) -> dict[str, tuple[Path, ast.Module]]:
    """Every module of a package by its dotted name."""
    files = sorted((root / package).rglob("*.py"))
    return {name_of(path, root): (path, ast.parse(path.read_text("utf-8"), str(path))) for path in files}


def imports(modules: Mapping[str, tuple[Path, ast.Module]], root: Path) -> list[Import]:
    found = []
    for name, (path, tree) in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(node, name, is_package=path.name == "__init__.py")
                inside = [f"{base}.{alias.name}" for alias in node.names]
                targets = [full if full in modules else base for full in inside]
            else:
                continue
            where = f"{path.relative_to(root)}:{node.lineno}"
            found += [Import(name, target, where) for target in dict.fromkeys(targets)]
    return found


def _absolute(node: ast.ImportFrom, importer: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    up = node.level - is_package
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def room_of(module: str) -> str:
    """The room of a module of steering: its first name below the package."""
    return module.split(".")[1] if "." in module else module


def crossings(found: list[Import]) -> list[str]:
    """What is wrong with the floors, a line each."""
    wrong = []
    for one in found:
        if one.target.split(".")[0] != "steering":
            continue
        upper, lower = room_of(one.importer), room_of(one.target)
        if lower not in FLOORS or upper not in FLOORS:
            wrong.append(f"{one.where}: {one.importer} imports {one.target}: a room that has no floor in FLOORS")
        elif upper != lower and FLOORS[lower] >= FLOORS[upper]:
            wrong.append(
                f"{one.where}: {upper} (floor {FLOORS[upper]}) imports {one.target} (floor {FLOORS[lower]}), "
                f"expected imports from lower floors only"
            )
    return wrong


def circles(found: list[Import], modules: Mapping[str, object]) -> list[list[str]]:
    """Groups of modules that reach one another: the strongly connected components of more than one module (Tarjan)."""
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for one in found:
        if one.target in graph:
            graph[one.importer].add(one.target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = stack.index(name)
            groups.append(sorted(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in order:
            visit(name)
    return [group for group in groups if len(group) > 1 or group[0] in graph[group[0]]]


def strangers(found: list[Import]) -> list[str]:
    """Imports of other people's libraries outside the rooms that may have them, a line each."""
    wrong = []
    for one in found:
        library = one.target.split(".")[0]
        if library == "steering" or library in sys.stdlib_module_names:
            continue
        homes = HOMES.get(library, ())
        if not any(one.importer == home or one.importer.startswith(home + ".") for home in homes):
            wrong.append(
                f"{one.where}: {one.importer} imports {library}, expected only in {', '.join(homes) or 'HOMES'}"
            )
    return wrong


def public_parts(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The module, its public functions and classes, and the public methods of these, with their names."""
    yield tree, "the module"
    pending: list[tuple[ast.AST, str]] = [(node, "") for node in tree.body]
    while pending:
        node, prefix = pending.pop()
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_") and not _is_variant(node):
            yield node, prefix + node.name
            if isinstance(node, ast.ClassDef):
                pending += [(inner, f"{node.name}.") for inner in node.body]


def _is_variant(node: ast.AST) -> bool:
    """An overload or a setter: the first form, or the getter, has the docstring."""
    names = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(name.split(".")[-1] in ("overload", "setter", "deleter") for name in names)


def parameters(function: Function) -> int:
    arguments = function.args
    stars = [star for star in (arguments.vararg, arguments.kwarg) if star]
    return len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs + stars)


STEERING = read(ROOT, "steering")
PRODUCT = STEERING | read(ROOT, "workflows")
IMPORTS = imports(STEERING, ROOT)
WORKFLOWS = sorted((ROOT / "workflows").glob("*.py"))


def functions() -> Iterator[tuple[str, Function]]:
    for path, tree in PRODUCT.values():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}", node


def test_imports_go_down_only():
    assert crossings(IMPORTS) == []


def test_no_module_is_in_an_import_circle():
    assert circles(IMPORTS, STEERING) == []


def test_libraries_stay_in_their_homes():
    assert strangers(IMPORTS) == []


def test_steering_never_imports_its_users():
    outside = {path.stem for folder in ("workflows", "tests") for path in (ROOT / folder).glob("*.py")}
    users = {"workflows", "tests", *outside}
    assert [one.where for one in IMPORTS if one.target.split(".")[0] in users] == []


def test_every_library_with_a_home_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[\s\[<>=~!;]", line)[0].lower() for line in lines}
    assert {DISTRIBUTIONS.get(library, library).lower() for library in HOMES} <= declared


def test_functions_are_short():
    lines = {where: node.end_lineno - node.lineno + 1 for where, node in functions()}
    assert {where: n for where, n in lines.items() if n > FUNCTION_LINES} == {}


def test_functions_have_few_parameters():
    counts = {where: parameters(node) for where, node in functions()}
    assert {where: n for where, n in counts.items() if n > PARAMETERS} == {}


def test_modules_are_short():
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, (path, _) in PRODUCT.items()}
    assert {name: n for name, n in lines.items() if n > MODULE_LINES} == {}
    assert statistics.median(lines.values()) <= MEDIAN_MODULE_LINES


def test_every_public_name_says_what_it_is():
    silent = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in PRODUCT.values()
        for node, name in public_parts(tree)
        if not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_one_documented_entry(path):
    _, tree = PRODUCT[f"workflows.{path.stem}"]
    [entry] = [node for node in tree.body if isinstance(node, Function) and node.name == "main"]
    assert [argument.arg for argument in entry.args.args] == ["folder", "arguments"]
    assert ast.get_docstring(entry)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_says_its_arguments_and_leaves_nothing(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command line names the workflow there
    assert main(["run", str(path), "--help"]) == 0
    output = capsys.readouterr()
    assert "usage:" in output.out
    assert output.err == ""
    options = re.findall(r"^  (?:-h, )?(--[\w-]+)", output.out, re.MULTILINE)
    assert "--help" in options
    assert taken_out([f"{option}=x" for option in options])[1] == [f"{option}=x" for option in options], "as of `run`"
    assert take_flags(argparse.Namespace(detach=False, quiet=False), options) == options, "as of `run`"
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == []


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.endswith("_") and name.isidentifier()


def reached(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private names of others that a module uses: where, and which."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name("self" | "cls")) | ast.Attribute(value=ast.Call(func=ast.Name("super"))):
                pass
            case ast.Attribute(attr=name) if private(name):
                yield node.lineno, name
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "steering":
                yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[*targets]):
                named = (str(each.value).rpartition(".")[2] for each in targets if isinstance(each, ast.Constant))
                yield from ((node.lineno, name) for name in named if private(name))


def test_tests_reach_in_by_public_names():
    ours = {name for _, tree in STEERING.values() for node in ast.walk(tree) for name in defined(node) if private(name)}
    files = sorted((ROOT / "tests").rglob("*.py"))
    found = [(path, line, name) for path in files for line, name in reached(ast.parse(path.read_text("utf-8")))]
    assert [f"{path.relative_to(ROOT)}:{line}: {name}" for path, line, name in found if name in ours] == []


def defined(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Name(ctx=ast.Store()):
            return [node.id]
        case ast.Attribute(ctx=ast.Store()):
            return [node.attr]
    return []


# The reader itself: a wall that is not watched looks like one that holds.

BROKEN = {
    "records/__init__.py": "",
    "records/low.py": "from steering.runner import top",
    "runner/__init__.py": "",
    "runner/top.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..view import page",
    "runner/other.py": "def late():\n    import torch.nn",
    "view/__init__.py": "from .page import x",
    "view/page.py": "from steering.runner.top import y\nfrom steering.records import low",
    "learning/__init__.py": "import steering.inference",
    "inference/__init__.py": "",
    "attic/__init__.py": "import steering.records",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    root = tmp_path_factory.mktemp("broken")
    for name, source in {"__init__.py": "", **BROKEN}.items():
        file = root / "steering" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    modules = read(root, "steering")
    return imports(modules, root), modules


def test_the_reader_sees_upward_sideways_and_unknown(broken):
    found, _ = broken
    assert [line.split(": ")[0] for line in crossings(found)] == [
        "steering/attic/__init__.py:1",
        "steering/learning/__init__.py:1",
        "steering/records/low.py:1",
        "steering/runner/top.py:3",
    ]


def test_the_reader_sees_circles_through_types_and_relative_imports(broken):
    found, modules = broken
    assert circles(found, modules) == [
        ["steering.records.low", "steering.runner.top", "steering.view.page"],
    ]


def test_the_reader_sees_imports_inside_functions(broken):
    found, _ = broken
    assert [line.split(": ")[0] for line in strangers(found)] == ["steering/runner/other.py:2"]
