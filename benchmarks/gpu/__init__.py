"""What needs a GPU: `python -m benchmarks.gpu PART`, for a machine without a network."""
