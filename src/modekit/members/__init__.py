"""Who is in a finished mixture: experts are let in, go, are replaced and renamed; what each brought."""
