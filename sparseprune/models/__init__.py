"""What a model is made of (sites, blocks), how it is called (batches), and where it comes from (loading)."""
