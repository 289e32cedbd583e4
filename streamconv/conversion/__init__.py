"""One conversion from beginning to end, and what is made of it: lazy tensors, an upload."""
