"""The host side of the Triton kernels: one file an operation. Nothing here imports Triton early."""
