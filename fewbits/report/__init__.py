"""What a run has to say, as data and as text. No input or output here: data in, page out."""
