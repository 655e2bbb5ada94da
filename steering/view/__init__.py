"""What a person sees of a run: the terminal display, the notebook panel, the report. Import from the files here."""
