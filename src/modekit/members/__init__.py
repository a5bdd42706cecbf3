"""Who is in a finished mixture: experts are added, removed and replaced; what each brought."""
