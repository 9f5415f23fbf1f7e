"""compressed-tensors directories: arrays, config groups, schemes for the runtime."""
