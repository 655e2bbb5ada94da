"""README.md: it stays one page, and what it points to exists. Its workflow and its example of the rehearsal buffer are
in docs/, where tests/test_docs.py runs them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"


def test_what_it_points_to_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_is_one_page():
    """Two screens of a text editor; what is longer belongs in docs/."""
    assert len(README.splitlines()) <= 60


def test_the_map_names_every_room():
    rooms = {f"steering/{p.name}" for p in (ROOT / "steering").iterdir() if (p / "__init__.py").exists()}
    map_ = (DOCS / "explanation/design.md").read_text()
    assert rooms == set(re.findall(r"^\| `(steering/\w+)`", map_, re.MULTILINE))


def test_what_a_user_writes_is_short():
    assert len(example("tutorials/laptop.md", "my_run.py").splitlines()) <= 20
    assert len(example("tutorials/own-network.md", "train.py").splitlines()) <= 25


def example(page, title):
    """The file that a page shows."""
    pattern = rf'^```python title="{title}"\n(.*?)^```$'
    [found] = re.findall(pattern, (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return found
