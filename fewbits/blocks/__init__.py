"""A model run block by block, and what can be changed in it on the way."""
