"""Kernels for Hopper (H100, H200), in Pallas for Mosaic GPU. JAX 0.11 or newer."""
