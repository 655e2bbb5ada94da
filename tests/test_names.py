"""What `import steering` hands out: every name, from the room it is defined in, and nothing heavy before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import steering


def test_the_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(steering.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert {name: getattr(sys.modules[home], name) for name, home in seen.items() if getattr(steering, name)} == {
        name: getattr(steering, name) for name in steering.__all__ if name != "__version__"
    }


def test_importing_steering_loads_nothing_heavy_and_its_rooms_come_when_asked_for():
    program = """
import sys, steering
assert steering.__version__ and "Experiment" in dir(steering)
heavy = {"torch", "dask", "distributed", "numpy", "xarray", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
steering.local
assert "torch" not in sys.modules
from steering import Experiment
assert Experiment is steering.runner.Experiment
assert not hasattr(steering, "nothing_of_the_kind")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
