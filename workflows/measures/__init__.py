"""What several workflows measure in the same way."""
