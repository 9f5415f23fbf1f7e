"""Statistics of the model's activations: calibration text, capture block by block, saved files."""
