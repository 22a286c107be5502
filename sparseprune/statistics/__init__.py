"""Statistics of a model's linear layers: of their inputs, of their gradients, in whole passes or block by block."""
