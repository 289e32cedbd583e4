"""The machine below: memory, child processes, signals."""
