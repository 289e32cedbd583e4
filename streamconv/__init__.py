"""streamconv."""
