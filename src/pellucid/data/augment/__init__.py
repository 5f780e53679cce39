"""Picture 2, augment: more of the same text, said differently; see pipeline.py for how the pieces fit together."""
