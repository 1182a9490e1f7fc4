"""The performance table: `python as_package.py benchmarks.run`."""
