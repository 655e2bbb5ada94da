"""What a person sees of a run: the terminal display, the notebook panel, the report. Import from its modules."""
