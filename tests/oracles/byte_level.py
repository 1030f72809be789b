"""Byte-level BPE, re-derived: the bytes that a token stands for."""


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def token_bytes(token: str) -> bytes:
    """The bytes of an ordinary token as its vocabulary spells it."""
    table = byte_of_character()
    return bytes(table[character] for character in token)
