"""Parts of the reference that are written when the site is built: the command line, from its own parsers, and public
names that no page has. MkDocs calls `on_page_markdown` and `on_post_page` of this file for every page."""

import argparse
import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import steering
from steering import cli
from steering.loading import loaded

HERE = Path(__file__).parent
WORKFLOWS = HERE.parents[1] / "workflows"
MARK = re.compile(r"^<!-- written when the site is built: (\w+) -->$", re.MULTILINE)
SHOWN = re.compile(r"^::: (\S+)$", re.MULTILINE)


class Parsed(Exception):
    """The arguments were taken by a parser, and nothing was done."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


@contextmanager
def only_parsed() -> Iterator[None]:
    """Inside, what parses arguments raises Parsed once they are taken; those that are not taken end as usual."""
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *given: object, **named: object) -> None:
        real(self, *given, **named)
        raise Parsed(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse):
        yield


def parser_of(workflow: Path) -> argparse.ArgumentParser:
    """The parser of a workflow's arguments."""
    seen = []

    def parse(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        seen.append(self)
        raise Parsed(self)

    with loaded(workflow) as entry, mock.patch.object(argparse.ArgumentParser, "parse_args", parse):
        try:
            entry(None, [])
        except Parsed:
            return seen[0]
    raise ValueError(f"{workflow}: found no parser, expected one that main uses first")


def commands() -> str:
    """The commands, each with its arguments."""
    return "\n\n".join(_commands(cli.parser(), "steering"))


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            meanings = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for verb, inner in action.choices.items():
                said = inner.description or meanings.get(verb, "")
                yield f"## {name} {verb}\n\n{_sentence(said)}"
                table = _table(inner)
                if table:
                    yield table
                if inner.epilog:
                    yield inner.epilog
                yield from _commands(inner, f"{name} {verb}")


def workflows() -> str:
    """The workflows, each with its arguments."""
    pieces = []
    for path in sorted(WORKFLOWS.glob("*.py"), key=lambda path: (path.stem.startswith("bench_"), path.stem)):
        parser = parser_of(path)
        about = parser.description or (ast.get_docstring(ast.parse(path.read_text())) or path.stem).split("\n\n")[0]
        pieces += [f"## {path.stem}", _sentence(about), _table(parser)]
        if parser.epilog:
            pieces.append(f"```text\n{parser.epilog.strip()}\n```")
    return "\n\n".join(piece for piece in pieces if piece)


def others() -> str:
    """The public names that no page shows."""
    shown = {name.rpartition(".")[2] for page in HERE.glob("*.md") for name in SHOWN.findall(page.read_text())}
    missing = sorted({*steering.__all__} - shown - {"__version__"})
    found = "\n".join(f"::: {getattr(steering, name).__module__}.{name}" for name in missing)
    return f"## Everything else\n\n{found}" if found else ""


def _sentence(text: str) -> str:
    said = " ".join(text.split())
    return said[:1].upper() + said[1:] + ("" if said.endswith(".") else ".")


def _table(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else _value(action)
        name = f"{action.option_strings[-1]} {value}".strip() if action.option_strings else value
        meaning = (action.help or f"({action.default})").replace("%%", "%").replace("|", "\\|")
        rows.append(f"| `{name}` | {meaning}{', required' if action.required and action.option_strings else ''} |")
    return "\n".join(["| argument | meaning |", "|---|---|", *rows]) if rows else ""


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.metavar:
        return action.metavar
    if action.choices:
        return ",".join(str(choice) for choice in action.choices)
    return action.dest.upper() if action.option_strings else action.dest


WRITTEN = {"commands": commands, "workflows": workflows, "others": others}


def on_page_markdown(markdown: str, **_: object) -> str:
    """The text of a page with what is written here in its place."""
    return MARK.sub(lambda mark: WRITTEN[mark[1]](), markdown)


def on_post_page(output: str, **_: object) -> str:
    """The page with what the theme's choice of light or dark switches on and off, and fails without: the colours of
    code that is coloured in the browser, which here is coloured before."""
    return output.replace("</head>", '<style id="hljs-light"></style><style id="hljs-dark"></style></head>', 1)
