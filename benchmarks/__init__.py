"""How fast the influence engine is: ratios, each measured in one run. Start with `python -m benchmarks`."""
