"""Who is in a finished mixture: experts are added, removed, replaced and renamed; what each brought."""
