"""Outside systems: one module each. `hf` alone imports transformers."""
