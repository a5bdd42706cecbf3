"""What a mixture is worth and what its routers do."""
