"""From a checkpoint and a model to a plan, in a child process."""
