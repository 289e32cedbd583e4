"""verl's FSDP checkpoints: one state dict per rank."""
