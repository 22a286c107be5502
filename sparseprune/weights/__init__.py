"""A sparse weight, from its form on disk to the module that multiplies by it."""
