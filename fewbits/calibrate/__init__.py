"""What the model's activations look like: where text comes from, statistics, capture block by block."""
