"""Where the work runs: context managers that yield a `distributed.Client` with workers that carry the roles.

Roles are Dask resources: `trainer` (one worker for each rank), `inference`, `source`, `label`, `runner`. A new kind is
one file here and one line in tests/test_clusters.py.
"""

from steering.clusters.choose import add_cluster, cluster
from steering.clusters.existing import existing
from steering.clusters.local import local
from steering.clusters.queue import job_queue, slurm
from steering.clusters.site import Job, Site

__all__ = ["Job", "Site", "add_cluster", "cluster", "existing", "job_queue", "local", "slurm"]
