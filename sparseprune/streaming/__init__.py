"""Pruning a model that does not fit into memory: from shards to sparse shards, block by block."""

from sparseprune.streaming.report import StreamReport
from sparseprune.streaming.stream import prune_folder

__all__ = ["StreamReport", "prune_folder"]
