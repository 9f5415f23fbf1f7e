"""`import fewbits.transformers`: registers native directories with from_pretrained and save_pretrained."""

from .runtime.register import register

register()
