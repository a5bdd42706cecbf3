"""From dense models to mixtures and back: densify, upcycle, and fewer experts from more (docs/experts.md)."""
