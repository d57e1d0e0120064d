"""A model and texts: load a model, read texts, record them, resume what was interrupted."""
