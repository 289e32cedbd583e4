"""LoRA adapters in a checkpoint: recognised, checked, merged into their base or handed on."""
