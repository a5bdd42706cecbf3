"""Who may reach a server of modekit's own, and how it listens: `modekit serve` and `modekit front`."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING

from modekit.errors import EngineError

if TYPE_CHECKING:
    import uvicorn

    from modekit.engines.guard import App

KEY = "MODEKIT_API_KEY"
"""The environment variable with the key that clients must send."""
_BACKLOG = 1_024
_GRACE_S = 5  # in which answers may end
_HEAD = 2**16  # bytes of a request's head


def key_in(variable: str) -> str | None:
    """The key in an environment variable; None where it is not set. Raises EngineError for an empty one."""
    key = os.environ.get(variable)
    if key is not None and not key.strip():
        raise EngineError(
            "the key is empty",
            where=f"{variable} in the environment",
            found=repr(key),
            remedy="give it a value, or unset the variable to serve without a key",
        )
    return key


def refuse_other_machines(host: str) -> None:
    """Raise EngineError where an address without a key can be reached from other machines."""
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return  # it cannot be listened on either, which is another error
    if not all(ip_address(each.partition("%")[0]).is_loopback for each in found):
        raise EngineError(
            "other machines could send requests without a key",
            where=f"--host {host}",
            found=f"no {KEY} in the environment",
            remedy=f"set {KEY} to the key that clients must send; --no-key serves everybody who reaches the address",
        )


def server_of(app: App, listener: socket.socket) -> uvicorn.Server:
    """A server that is yet to run; who connects from now on waits until it does."""
    import uvicorn

    listener.listen(_BACKLOG)
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
        http="h11",  # httptools, which uvicorn takes where it finds it, bounds no head
        h11_max_incomplete_event_size=_HEAD,
    )
    return uvicorn.Server(config)


@contextmanager
def answering(app: App, listener: socket.socket) -> Iterator[None]:
    """While open, an application answers on a socket, in a thread of its own."""
    server = server_of(app, listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def bound_socket(host: str, port: int) -> socket.socket:
    """One that is bound to an address; port 0: any that is free. Raises EngineError when it cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise EngineError(
            "the address cannot be listened on",
            where=f"{host}:{port}",
            found=getattr(error, "strerror", None) or str(error),
            remedy="choose another --port (0: any that is free) or --host",
        ) from None
    return bound


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that nobody listens on now. Raises EngineError when it cannot be listened on."""
    with bound_socket(host, port) as bound:
        return int(bound.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Of an address that is listened on."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
