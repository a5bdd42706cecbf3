"""The text that experts are made of: domains of equal size, and a tokenizer trained on all of them."""
