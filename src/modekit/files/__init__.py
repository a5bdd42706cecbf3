"""The one door to the disk: what may be read of a stranger's file, and how everything that is written appears."""
