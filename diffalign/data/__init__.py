"""Files other people publish: prompt sets of benchmarks and preference data, read in their own formats."""
