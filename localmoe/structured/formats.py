"""Formats of strings as patterns in Rust's syntax, each of bounded length.

What a pattern allows is of its format for every reader: dates that exist in all years, seconds
without leap ones, ASCII only. A format that isn't here says nothing of the text (password, path,
int64), as JSON Schema has it for those that a reader doesn't know.
"""

from __future__ import annotations

DATE = (
    "[1-9][0-9]{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|10|12)-31)"
)
TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?"
    "(?:Z|[-+](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
HEX = "[0-9a-fA-F]"
BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = f"{BYTE}(?:\\.{BYTE}){{3}}"
GROUP = f"{HEX}{{1,4}}"
IPV6 = (
    f"(?:{GROUP}(?::{GROUP}){{7}}|::(?:{GROUP}(?::{GROUP}){{0,5}})?"
    + "".join(
        f"|{GROUP}(?::{GROUP}){{{n}}}::(?:{GROUP}(?::{GROUP}){{0,{4 - n}}})?" for n in range(5)
    )
    + ")"
)
LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?"
HOST = f"{LABEL}(?:\\.{LABEL}){{0,3}}"
DOMAIN = f"(?:{LABEL}\\.){{1,3}}[a-zA-Z]{{2,12}}"
SEGMENT = "(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
TAIL = f"(?:\\?(?:{SEGMENT}|[/?]){{0,200}})?(?:#(?:{SEGMENT}|[/?]){{0,80}})?"
PATH = f"(?:/{SEGMENT}{{0,80}}){{0,12}}"
URI = f"https?://{HOST}(?::[0-9]{{1,4}})?{PATH}{TAIL}"
URI_REFERENCE = f"(?:{URI}|{PATH}{TAIL})"
POINTER = "(?:/(?:[^/~\\x00-\\x1f\\x7f]|~[01]){0,80}){0,12}"
DURATION = (
    "P(?:[0-9]{1,4}W|(?:[0-9]{1,4}Y(?:[0-9]{1,3}M(?:[0-9]{1,4}D)?)?"
    "|[0-9]{1,3}M(?:[0-9]{1,4}D)?|[0-9]{1,4}D)(?:T{0})?|T{0})"
).replace(
    "{0}",
    "(?:[0-9]{1,4}H(?:[0-9]{1,4}M(?:[0-9]{1,5}S)?)?|[0-9]{1,4}M(?:[0-9]{1,5}S)?|[0-9]{1,5}S)",
)
LOCAL_PART = "[a-zA-Z0-9]{1,32}(?:[._+-][a-zA-Z0-9]{1,32}){0,3}"
MAX_EMAIL_CHARS, MAX_URI_CHARS = 270, 1500
BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
BASE64URL = "(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}(?:==)?|[A-Za-z0-9_-]{3}=?)?"


def _uuid(version: str, variant: str = HEX) -> str:
    return f"{HEX}{{8}}-{HEX}{{4}}-{version}{HEX}{{3}}-{variant}{HEX}{{3}}-{HEX}{{12}}"


PATTERNS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "duration": DURATION,
    "uuid": _uuid(HEX),
    **{f"uuid{n}": _uuid(str(n), "[89ab]") for n in range(1, 9)},
    "ipv4": IPV4,
    "ipv6": IPV6,
    "hostname": HOST,
    "email": f"{LOCAL_PART}@{DOMAIN}",
    "uri": URI,
    "uri-reference": URI_REFERENCE,
    "json-pointer": POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]{{0,3}})(?:#|{POINTER})",
    "byte": BASE64,
    "base64url": BASE64URL,
    "e164": "\\+[1-9][0-9]{6,14}",
}
ALIASES = {
    "guid": "uuid", "url": "uri", "iri": "uri", "iri-reference": "uri-reference",
    "uri-template": "uri-reference", "idn-email": "email", "idn-hostname": "hostname",
    "base64": "byte", "ip": "ipv4", "ipvanyaddress": "ipv4", "datetime": "date-time",
}  # fmt: skip
"""Formats by their other names, or of which another is a part."""
LENGTHS = {
    "date": (10, 10), "time": (9, 22), "date-time": (20, 33), "ipv4": (7, 15), "ipv6": (2, 39),
    "uuid": (36, 36), **{f"uuid{n}": (36, 36) for n in range(1, 9)}, "uri": (5, MAX_URI_CHARS),
    "email": (5, MAX_EMAIL_CHARS), "hostname": (1, 131), "duration": (3, 40),
}  # fmt: skip
"""The fewest and the most characters of a format, where that is known."""
CHECKED_AT_THE_END = frozenset(["regex"])


def canonical_format(name: str) -> str:
    """Returns the name in `PATTERNS` for a format, or the name itself."""
    return ALIASES.get(name, name)
