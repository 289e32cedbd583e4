"""The command line: the only floor that prints. Everything heavy is imported inside a command."""
