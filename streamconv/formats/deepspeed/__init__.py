"""DeepSpeed's checkpoints: every ZeRO stage, expert and pipeline files, tensor parallel ranks."""
