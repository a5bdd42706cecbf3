"""What a weight difference in a few bits takes, by its shape alone: without numpy, so that a plan can ask."""


def bytes_of_codes(outputs: int, inputs: int, bits: int) -> int:
    """Of the codes of a weight (O, I): planes of one bit, whose rows begin at a byte."""
    return outputs * bits * -(-inputs // 8)
