"""Texts by which llama.cpp is compared with transformers."""

TEXTS = (
    "The heart moves blood through the body. It beats about a hundred thousand times a day, and rests only between two beats.",
    "def area(width, height):\n    # two sides, 3.14 would be for circles\n    return width * height\n\n\nprint(area(12, 7))\n",
    "Das Gericht hat die Klage abgewiesen; die Kosten tr\u00e4gt der Kl\u00e4ger. L'appel est recevable, s'il est motiv\u00e9.",
    "Item 27:  4,096 kg at 19.95 \u2013 \u201cas is\u201d, we're told\n\n\tTotal\t81,715.20  (VAT 7%)\n",
)
"""Prose, code, other languages, numbers and white space."""
CUT_TEXTS = (
    *TEXTS,
    "\n \n\n \t\t  3 33 333 3333 33333 3.3 3..3 I've I'LL 'RE DON'T ======= ''''```\"\"\" \u043d\u0435\u0449\u043e "
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff5e \U0001f680 camelCase HTTPServer x_y\r\n  z",
)
"""With what ways to cut differ in: digits, cases, apostrophes, signs, scripts."""
