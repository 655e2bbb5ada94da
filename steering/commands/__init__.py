"""Commands of the command line that have more to them than a few lines; `steering.cli` puts them together."""
