"""Compare our code with golden tensors of the published implementation: `python as_package.py verify DIR`."""
