"""Routers: what they read, how they are fitted, what a fit keeps."""
