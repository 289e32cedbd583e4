"""Object stores: places with an address, listed, read and written by requests."""
