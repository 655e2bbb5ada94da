"""Images of classes to learn from, by any workflow: from memory, or from a folder and decoded beside training."""
