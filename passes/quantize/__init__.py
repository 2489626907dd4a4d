"""Fewer bits: integers and halves where the target has kernels for them."""
