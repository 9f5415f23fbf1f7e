"""File types: where the bytes of a checkpoint lie. One module (or a family of names) a type; open.py chooses."""
