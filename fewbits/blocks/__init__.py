"""A model run block by block, with changes to inputs and attention."""
