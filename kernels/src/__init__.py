"""GPU kernels, one a file with its launcher; importing this package does not import triton."""
