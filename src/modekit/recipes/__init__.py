"""What a user writes, checked at the door."""
