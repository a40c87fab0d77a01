"""Files as a bad disk or an editor may leave them."""

import random


def damage(blob: bytes, random_: random.Random) -> bytes:
    """The bytes of a file with a bit flipped, or a part lost, overwritten, put in or zeroed."""
    start = random_.randrange(len(blob))
    end = min(len(blob), start + random_.choice([1, 1, 8, 200]))
    noise = random_.randbytes(end - start)
    return random_.choice(
        [
            blob[:start] + bytes([blob[start] ^ 1 << random_.randrange(8)]) + blob[start + 1 :],
            blob[:start],
            blob[:start] + blob[end:],
            blob[:start] + noise + blob[end:],
            blob[:start] + noise + blob[start:],
            blob[:start] + bytes(end - start) + blob[end:],
        ]
    )
