"""Triton kernels of vicinal."""
