"""The compiled kernels: addresses, checks, and `torch.ops.sparseprune.*`."""
