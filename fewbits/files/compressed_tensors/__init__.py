"""compressed-tensors directories: arrays, config groups, what they tell a runtime."""
