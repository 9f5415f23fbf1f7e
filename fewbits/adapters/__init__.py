"""External systems, one module each."""
