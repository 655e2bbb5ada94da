"""Steering: continual learning that keeps a reconstruction network true while the beam is on.

Rooms, from the ground up: records, ptychography, models, policies, campaign, learning, inference, sources,
clusters, runner, view. Imports go downwards only. Start reading at `steering.runner` or at a file of workflows/.
"""

__version__ = "0.1.0"
