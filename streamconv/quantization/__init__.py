"""Quantized weights: which they are, their scales, and what config.json says of them."""
