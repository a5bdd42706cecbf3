"""What a mixture's routers do with text, what each expert is worth there, and how alike the experts are."""
