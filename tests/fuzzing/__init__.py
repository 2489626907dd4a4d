"""Random models, what must hold of every pipeline on them, and making one that fails smaller."""
