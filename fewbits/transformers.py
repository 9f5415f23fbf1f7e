"""`import fewbits.transformers`: from_pretrained and save_pretrained know native directories from then on."""

from .runtime.register import register

register()
