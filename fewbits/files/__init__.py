"""File types: the layouts of checkpoints. Each has one or more modules; open.py recognizes the type."""
