"""What the nightly run is made of: runs that the day has left, training on a memory, and the verdict on its outcome."""
