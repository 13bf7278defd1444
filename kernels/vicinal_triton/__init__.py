"""Triton kernels, installed as vicinal.kernels."""
