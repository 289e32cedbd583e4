"""Plain data that the floors hand to one another: boxes, recipes, sources, plans."""
