"""Training by gradients: rounding and block parameters of one block (`rounding`), then norms and block
parameters of the whole model against its reference (`distill`), or low-rank adapters beside frozen weights
(`lora`)."""
