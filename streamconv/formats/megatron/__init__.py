"""Megatron-Core's checkpoints: torch_dist and one folder per rank."""
