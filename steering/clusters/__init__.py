"""Where the work runs: context managers that yield a `distributed.Client` with workers that carry the roles.

Roles are Dask resources: `trainer` (one worker for each rank), `inference`, `source`, `label`, `runner`. A new kind is
one file here and one line in tests/test_clusters.py.
"""

from steering.clusters.existing import existing
from steering.clusters.local import local

__all__ = ["existing", "local"]
