"""A conversion on many machines, by engines that exist: they run the parts of one conversion."""
