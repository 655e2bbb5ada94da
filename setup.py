"""The one thing that pyproject.toml cannot say: an installed steering holds the workflows, as files to run and to copy.

In a checkout they stand beside the package, see steering.loading.shipped.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithWorkflows(build_py):
    """Copies workflows/ into the package as it is built; an editable install uses the checkout's own."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            inside = Path(self.build_lib) / "steering" / "workflows"
            shutil.rmtree(inside, ignore_errors=True)  # of an earlier build
            shutil.copytree("workflows", inside, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": WithWorkflows})
