"""The pictures of the benchmarks and comparisons, one file for each workflow or pair of them; any may be copied."""
