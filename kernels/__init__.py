"""Triton kernels; installs as fst_fast.kernels."""
