"""What this machine is and can do, and how long a conversion will take on it."""
