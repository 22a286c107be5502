"""What a model is made of (sites, blocks), how it is called (batches), and where it comes from (loading)."""

from sparseprune.models.blocks import find_blocks
from sparseprune.models.decoding import compile_decoding
from sparseprune.models.loading import demo_model_path, load_dense
from sparseprune.models.sites import WeightSite, find_sites

__all__ = ["WeightSite", "compile_decoding", "demo_model_path", "find_blocks", "find_sites", "load_dense"]
