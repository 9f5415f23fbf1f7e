"""File types: where the bytes of a checkpoint lie. One module or more a type; open.py tells which it is."""
