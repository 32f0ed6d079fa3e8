"""Where the `openai` engine sends its requests: address, key and proxies, checked before anything is sent.

And what must not get into a file or message: the key and the passwords of addresses, in all the forms in which a server may
send them back.
"""

import base64
import html
import ipaddress
import json
import os
import re
from importlib.util import find_spec
from urllib.parse import SplitResult, quote, quote_plus, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from mpa.files.records import InputError, without_secrets

OPENAI = "https://api.openai.com/v1"
SOCKS = ("socks5", "socks5h")
MASK = "…"


class Endpoint:
    """A server's `url` and `key`, and its name in messages, `server`. `base_url` None: $OPENAI_BASE_URL, or OpenAI.

    Raises InputError for an address, a key or a proxy that no request could be sent with, and for a secret in `request_json`.
    """

    def __init__(self, base_url: str | None, request_json: dict | None = None):
        what, url = "--base-url", base_url
        if url is None:
            what, url = "OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL")
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if url is not None and not url.strip():
            raise InputError(f"{what} is empty: name a server, or leave it out for OpenAI's.")
        if not (self.key or url):
            raise InputError(
                "OPENAI_API_KEY is not set: export your key, or name a server of your own with --base-url."
            )
        if not re.fullmatch(r"[!-~]*", self.key):
            raise InputError(
                "OPENAI_API_KEY holds a space, a line break or a character that no key has: export the key alone."
            )
        parts = _checked(url or OPENAI, what, ("http", "https"))
        if parts.query:
            raise InputError(f"{what} {_shown(url)}: an address with a query ('?…') cannot be used. Leave it out.")
        self.url, self.server = url or OPENAI, without_secrets(url) if url else "OpenAI"
        self.proxies = _checked_proxies()
        self.proxy = "" if proxy_bypass(parts.hostname) else self.proxies.get(parts.scheme, self.proxies.get("all", ""))
        secrets = [(None, self.key), *map(_password, [parts, *map(urlsplit, self.proxies.values())])]
        forms = {form for user, secret in secrets if _is_secret(secret) for form in _forms(secret, user)}
        self._secrets = re.compile("|".join(sorted(map(re.escape, forms), key=len, reverse=True)) or r"(?!)")
        if self.redact(request_json) != request_json:
            raise InputError("--request-json holds your key or a password: it is stored in files. Leave it out.")

    def redact(self, value):
        """The same JSON value, or text, without the key and the passwords."""
        if isinstance(value, str):
            return self._secrets.sub(MASK, value)
        if isinstance(value, dict):
            return {self.redact(name): self.redact(part) for name, part in value.items()}
        return [self.redact(part) for part in value] if isinstance(value, list) else value


def _shown(url: str) -> str:
    """An address for a message: without user, password and query, though it may not be a valid one."""
    return repr(re.sub(r"^([\w+.-]+://)?.*@", r"\1", url.partition("?")[0], flags=re.S))


def _checked(url: str, what: str, schemes: tuple[str, ...]) -> SplitResult:
    """The parts of an address. Raises InputError."""
    shown = f"{what} {_shown(url)}"
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise InputError(f"{shown}: holds a space or a line break. Remove it.")
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() not in schemes:
        raise InputError(f"{shown}: must start with {' or '.join(f'{s}://' for s in schemes)}.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host and re.fullmatch(r"[\d.]+|.*:.*", host):
            ipaddress.ip_address(unquote(host))
        elif host:
            host.encode("idna")
    except ValueError as error:  # UnicodeError too
        if "[" not in url and url.count(":") > 3:
            raise InputError(f"{shown}: an IPv6 address needs brackets, as in http://[::1]:8000/v1.") from None
        reason = "a port is a number from 1 to 65535" if str(error).startswith("Port ") else "check its host"
        raise InputError(f"{shown}: not a valid address ({reason}).") from None
    if not host:
        raise InputError(f"{shown}: names no host.")
    if port == 0:
        raise InputError(f"{shown}: port 0 is no port of a server.")
    return parts


def _checked_proxies() -> dict[str, str]:
    """{"http", "https" or "all": the proxy's address} of the environment. Raises InputError for one that cannot be used."""
    found = {scheme: value for scheme, value in getproxies().items() if scheme in ("http", "https", "all")}
    if any(host.strip() == "*" for host in getproxies().get("no", "").split(",")):
        return {}  # no proxy is used
    for scheme, value in found.items():
        name = next(
            (n for n, v in os.environ.items() if n.lower() == f"{scheme}_proxy" and v == value), f"{scheme} proxy"
        )
        found[scheme] = value = value if "://" in value else f"http://{value}"
        parts = _checked(value, name, ("http", "https", *SOCKS))
        if parts.scheme in SOCKS and not find_spec("socksio"):
            raise InputError(f"{name}: a SOCKS proxy needs the package socksio: pip install socksio, or unset {name}.")
    return found


def _password(parts: SplitResult) -> tuple[str | None, str]:
    return unquote(parts.username or ""), unquote(parts.password or "")


def _is_secret(text: str) -> bool:
    """Not a stand-in such as "none" or "ollama", which would be cut out of the replies' words."""
    return len(text) >= (16 if text.isalpha() else 6)


def _forms(secret: str, user: str | None) -> set[str]:
    """The secret as it is, and as it is written in URLs, JSON, HTML, hexadecimal digits and base64."""
    escaped = json.dumps(secret)[1:-1]
    forms = {
        secret,
        escaped,
        escaped.replace("/", "\\/"),
        html.escape(secret),
        repr(secret)[1:-1],
        secret.encode().hex(),
    }
    for encoded in (quote(secret, safe=""), quote_plus(secret), quote(secret)):
        forms |= {encoded, re.sub("%..", lambda digits: digits[0].lower(), encoded)}
    texts = [secret.encode(), *([f"{user}:{secret}".encode()] if user is not None else [])]
    for text in texts:
        for before in range(3):  # within a longer text it may begin at any of three places
            first, after = (0, 2, 3)[before], (before + len(text)) * 8 // 6
            part = base64.b64encode(b"\0" * before + text)[first:after].decode()
            forms |= {part, part.replace("+", "-").replace("/", "_")}
    return {form for form in forms if len(form) >= 6}
