"""The output folder: staged, published whole or not at all, and described by its manifest."""
