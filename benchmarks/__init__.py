"""Benchmarks of vicinal against PyTorch's own ways, interleaved in one process: `python -m benchmarks
--help`.
"""
