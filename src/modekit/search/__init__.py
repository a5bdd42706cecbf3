"""Which variant of a recipe's mixture is best, by held-out text?"""
