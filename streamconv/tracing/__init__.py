"""Tracing: ordinary torch code, run on meta tensors while planning, written down as recipes."""
