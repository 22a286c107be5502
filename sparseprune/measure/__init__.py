"""How fast, how small, how good? Speed of layers and models, perplexity, distance to the dense model, tasks."""
