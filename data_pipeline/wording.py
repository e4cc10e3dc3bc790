"""How is a number of things put into a message, so that one of them reads well, too?"""


def counted(number: int, singular: str, plural: str = "") -> str:
    """`1 image`, `3,000 images`; `plural` where it is not the singular with an s."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
