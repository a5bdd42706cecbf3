"""Who may reach a server, and where it listens."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

from modekit.errors import EngineError

KEY = "MODEKIT_API_KEY"
"""The environment variable with the key that clients must send."""


def key_of_clients(host: str, *, no_key: bool) -> str | None:
    """The key in the environment; None where clients need none. Raises EngineError where other machines could reach `host`
    without one.
    """
    key = os.environ.get(KEY, "").strip() or None
    if key is None and not no_key and not _is_local(host):
        raise EngineError(
            "other machines could send requests without a key",
            where=f"--host {host}",
            found=f"no {KEY} in the environment",
            remedy=f"set {KEY} to the key that clients must send; --no-key serves everybody who reaches the address",
        )
    return key


def _is_local(host: str) -> bool:
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return True  # it cannot be listened on either, which is another error
    return all(ip_address(each.partition("%")[0]).is_loopback for each in found)


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that nobody listens on now. Raises EngineError when it cannot be listened on."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            return int(bound.getsockname()[1])
    except (OSError, UnicodeError) as error:
        raise EngineError(
            "the address cannot be listened on",
            where=f"{host}:{port}",
            found=getattr(error, "strerror", None) or str(error),
            remedy="choose another --port (0: any that is free) or --host",
        ) from None


def url_of(host: str, port: int) -> str:
    """Of an address that is listened on."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
