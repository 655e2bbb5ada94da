"""A script that starts a cluster of this machine: each worker process imports it again."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType, ModuleType


def refuse_unguarded() -> None:
    """Raise RuntimeError where the script of this process would start its cluster anew in each worker.

    Said here in a sentence, before a process is started; Dask's own account of it is a traceback of each worker.
    """
    script = sys.modules["__main__"]
    path, line = getattr(script, "__file__", None), _line_of(script)
    spec = getattr(script, "__spec__", None)
    if path is None or line is None or (spec is not None and spec.name.endswith(".__main__")):
        return  # nothing that workers import: they leave out the __main__ of a package, as Python does
    try:
        guarded = is_guarded(Path(path).read_text("utf-8"), line)
    except (OSError, SyntaxError, ValueError):  # no file of Python's text: a zipped program, say
        return
    if not guarded:
        raise RuntimeError(
            f"{path}:{line}: found a cluster of this machine that starts while the script is imported, expected it "
            'below `if __name__ == "__main__":`, for each of its workers imports the script again: put this line there'
        )


def _line_of(module: ModuleType) -> int | None:
    """Line that the text of a module itself, outside of its functions, is at; None where it runs no more."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is vars(module) and frame.f_code.co_name == "<module>":
            return frame.f_lineno
        frame = frame.f_back
    return None


def is_guarded(source: str, line: int) -> bool:
    """Whether a line of a script is not reached where the script is imported: it stands in a statement
    `if __name__ == "__main__":`, or after one with `!=`, which may have left. Raises SyntaxError."""
    asking = [each for each in ast.parse(source).body if isinstance(each, ast.If) and _names(each.test, "__name__")]
    return any(
        each.lineno <= line <= (each.end_lineno or line)
        or (each.lineno < line and any(isinstance(node, ast.NotEq) for node in ast.walk(each.test)))
        for each in asking
    )


def _names(expression: ast.expr, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(expression))
