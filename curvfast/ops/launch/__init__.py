"""The host side of the Triton kernels, one file per operation. Triton is imported lazily."""
