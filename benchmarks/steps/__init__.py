"""Parts of `benchmarks.step` and `benchmarks.views`: ways to take a step, opponents, profiles."""
