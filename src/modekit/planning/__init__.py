"""Recipe and headers -> every tensor of the result and where it comes from."""
