"""The table of queues in the documentation and the code say the same."""

import ast
import re
from pathlib import Path

import pytest

import steering
from steering.sources import streams
from tests.test_layers import STEERING

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "queues.md"
KINDS = {"deque", "Queue", "SimpleQueue", "LifoQueue", "PriorityQueue", "EventQueue", "ThreadPoolExecutor"}
LOCAL = {("policies/trial.py", "pending"), ("clusters/existing.py", "apart"), ("runner/source_actor.py", "old")}
"""Of one call of a function: they end with it."""


def rows():
    """What each row of the page's tables says, by column."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 5 and cells[0] != "what waits" and not cells[0].startswith("---"):
            found.append(dict(zip(("what", "where", "bound", "full", "counted"), cells, strict=True)))
    return found


def places(row):
    """(module below steering/, name) of a row."""
    module = None
    for word in re.findall(r"`([^`]+)`", row["where"]):
        if word.endswith(".py"):
            module = word
        elif module is not None:
            yield module, word


def queues():
    """Where the code makes a queue: (module, name). A deque of a fixed length holds the newest and is none."""
    for path, tree in STEERING.values():
        module = path.relative_to(ROOT / "steering").as_posix()
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign | ast.AnnAssign | ast.With) or not made(node):
                continue
            yield from ((module, name) for name in names(node))


def made(node):
    """Whether a statement makes one, also by a factory of dataclasses."""
    parts = [item.context_expr for item in node.items] if isinstance(node, ast.With) else [node.value]
    calls = [one for part in parts if part is not None for one in ast.walk(part) if isinstance(one, ast.Call)]
    kinds = [call.func for call in calls]
    kinds += [word.value for call in calls for word in call.keywords if word.arg == "default_factory"]
    fixed = any(word.arg == "maxlen" for call in calls for word in call.keywords)
    return not fixed and any(getattr(kind, "attr", getattr(kind, "id", "")) in KINDS for kind in kinds)


def names(node):
    if isinstance(node, ast.With):
        return [item.optional_vars.id for item in node.items if isinstance(item.optional_vars, ast.Name)]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    own = [part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", None) for part in parts]
    return [name for name in own if name]


def defaults(module):
    """Numbers that a module gives names to: constants, settings, and defaults of parameters."""
    _, tree = next(found for found in STEERING.values() if found[0] == ROOT / "steering" / module)
    pairs = []
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                pairs += zip(targets, values, strict=True)
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
                pairs.append((target, node.value))
            case ast.arguments():
                pairs += zip(reversed(node.args), reversed(node.defaults), strict=False)
                pairs += zip(node.kwonlyargs, node.kw_defaults, strict=True)
    return {getattr(t, "id", getattr(t, "arg", "")): number(value) for t, value in pairs if number(value) is not None}


def number(node):
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.BinOp(left=ast.Constant(value=base), op=ast.Pow(), right=ast.Constant(value=power)):
            return base**power
    return None


def test_every_queue_of_the_code_is_in_the_table():
    told = {place for row in rows() for place in places(row)}
    here = set(queues()) - LOCAL
    assert len(here) > 15
    assert {place for place in here if place not in told} == set()


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["what"])
def test_what_the_table_names_is_there_and_its_bounds_are_the_codes(row):
    for module, name in places(row):
        assert re.search(rf"\b{name}\b", (ROOT / "steering" / module).read_text()), f"{module} has no {name}"
    assert row["bound"] != "-"
    modules = [word for word in re.findall(r"`([^`]+)`", row["where"]) if word.endswith(".py")]
    known = {name: value for m in [*modules, "inference/event_queue.py"] for name, value in defaults(m).items()}
    for word, said, unit in re.findall(r"`([\w.]+)`(?: ([\d,.]*\d))?( [GM]iB)?", row["bound"]):
        owner, _, setting = word.rpartition(".")
        found = vars(getattr(steering, owner, None) or getattr(streams, owner))[setting] if owner else known[setting]
        if said:
            assert found == float(said.replace(",", "")) * {" GiB": 2**30, " MiB": 2**20, "": 1}[unit], word
