"""Loads a workflow file, and the modules that stand beside it: `import helper` finds helper.py or helper/__init__.py.

Workers can import neither, those of a cluster that somebody else started cannot even see the folder. So what these
files define is pickled by value, which pickle and cloudpickle do for whatever says that it is from a module that cannot
be imported. A function that runs on a worker must therefore have its imports at the top of its file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle

Entry = Callable[[Any, list[str]], Any]
"""main(folder, arguments) of a workflow."""


def shipped() -> Path:
    """The folder of the workflows that come with this package: in it where it was installed, beside it in a checkout.

    Raises FileNotFoundError where they are in neither place.
    """
    package = Path(__file__).parent
    for folder in (package / "workflows", package.parent / "workflows"):
        if (folder / "simulated_drift.py").is_file():
            return folder
    raise FileNotFoundError(f"{package}: found no workflows there, expected a checkout, or a wheel made from one")


def located(workflow: Path) -> Path:
    """The file that is meant: workflows/NAME.py is the one that comes with this package where there is none."""
    if workflow.exists() or workflow.parts[:1] != ("workflows",):
        return workflow
    own = shipped().parent / workflow
    return own if own.is_file() else workflow


@contextmanager
def loaded(workflow: Path) -> Iterator[Entry]:
    """The `main` of a workflow file; the modules beside it can be imported until the block is left.

    Nothing is added to sys.path, and a module of Python's own or an installed one is never replaced: a random.py beside
    the workflow stays without effect. What this process has imported from there before, as a notebook does, is set
    aside until the block is left: it would be sent to workers by its name. Raises FileNotFoundError where there is no
    such file, ValueError for one that cannot be loaded or has no `main`.
    """
    if not workflow.is_file():
        found = "a folder" if workflow.is_dir() else "no such file"
        raise FileNotFoundError(f"{workflow}: found {found}, expected a workflow file (see {shipped()})")
    beside = _Beside(workflow.absolute().parent)
    before = beside.set_aside()
    sys.meta_path.insert(0, beside)
    try:
        entry = getattr(_execute(workflow), "main", None)
        if not callable(entry):
            raise ValueError(f"{workflow}: found no function main, expected `def main(folder, arguments)`")
        yield entry
    finally:
        sys.meta_path.remove(beside)
        beside.forget()
        sys.modules.update(before)


def _execute(workflow: Path) -> ModuleType:
    name = f"workflow_{workflow.stem}"
    spec = importlib.util.spec_from_file_location(name, workflow)
    if spec is None or spec.loader is None:
        raise ValueError(f"{workflow}: found a file of another kind, expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        file = workflow if error.filename == str(workflow) else error.filename
        raise ValueError(f"{file}, line {error.lineno}: found a syntax error ({error.msg}), nothing was run") from error
    except ImportError as error:
        raise ValueError(
            f"{workflow}: {error}; expected all its imports to be installed or beside it, nothing was run"
        ) from error
    finally:
        sys.modules.pop(name, None)  # a module that cannot be found by its name is pickled by value
    return module


class _Beside(MetaPathFinder):
    """Finds the modules in a folder that are found nowhere else, and their submodules."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As importlib asks: what a module is loaded from; None where it is not one of these."""
        parent = fullname.rpartition(".")[0]
        if parent and parent not in self._names:
            return None
        spec = PathFinder.find_spec(fullname, path if parent else [self._folder])
        if spec is None or spec.loader is None:  # a folder of data is no package because it has a name
            return None
        if not parent and self._elsewhere(fullname, spec):
            return None
        self._names.add(fullname)
        if type(spec.loader) is SourceFileLoader:
            spec.loader = _ByValue(spec.loader.name, spec.loader.path)
        return spec

    def _elsewhere(self, name: str, mine: ModuleSpec) -> bool:
        """Whether another file is what this name means without us."""
        specs = (finder.find_spec(name, None) for finder in sys.meta_path if finder is not self)
        found = next((spec for spec in specs if spec is not None), None)
        return found is not None and found.origin != mine.origin

    def set_aside(self) -> dict[str, ModuleType]:
        """Take out of sys.modules, and return by name, what was imported from the folder before; never this package."""
        tops = {name.partition(".")[0] for name in sys.modules} - {"__main__", __name__.partition(".")[0]}
        here = {name for name in tops if self._is_from_here(name)}
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in here}

    def _is_from_here(self, name: str) -> bool:
        file = getattr(sys.modules.get(name), "__file__", None)
        places = (Path(self._folder, f"{name}.py"), Path(self._folder, name, "__init__.py"))
        return file is not None and Path(file).resolve() in [place.resolve() for place in places]

    def forget(self) -> None:
        """As if these modules had never been imported."""
        for name in self._names:
            module = sys.modules.pop(name, None)
            if module is not None and name in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.unregister_pickle_by_value(module)


class _ByValue(SourceFileLoader):
    """Loads a module whose functions and classes, and which itself, are pickled by value."""

    def exec_module(self, module: ModuleType) -> None:
        """Run its code. Dask tries pickle first, which refuses what says that it is from nowhere, then cloudpickle."""
        super().exec_module(module)
        cloudpickle.register_pickle_by_value(module)
        _disown(module, module.__name__)


def _disown(thing: ModuleType | type, module: str) -> None:
    for value in list(vars(thing).values()):
        if isinstance(value, type | FunctionType) and value.__module__ == module:
            value.__module__ = f"workflow_{module}"
            if isinstance(value, type):
                _disown(value, module)
