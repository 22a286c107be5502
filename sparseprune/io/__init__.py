"""Checkpoints: written by rename, validated when read."""
