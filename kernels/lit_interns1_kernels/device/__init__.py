"""Triton kernels: what the operations run on a GPU. Imported only where Triton is, and only when needed."""
