"""Files other people publish: prompt sets of benchmarks and preference data, read in their own formats.

from diffalign.data.prompt_sets import read_prompts
from diffalign.data.preferences import read_comparisons
"""
