"""Rules that check pictures: pure functions of boxes, strings and numbers, for rewards and benchmarks."""
