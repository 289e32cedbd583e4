"""Models as HuggingFace's own libraries save them: finished ones, and the pieces of ranks."""
