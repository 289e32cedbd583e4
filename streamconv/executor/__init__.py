"""The byte path: moves what a plan says, within the budget, without torch."""
