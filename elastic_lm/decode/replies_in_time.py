"""HTTP whose timeout bounds a whole request. That of a socket bounds each read, and a reply may drip."""

import functools
import http.client
import io
import time
import urllib.request
from collections.abc import Callable
from typing import Any


def opener() -> urllib.request.OpenerDirector:
    """What opens requests with a timeout, until which the last byte of the reply must have come.

    Redirects are errors: they would turn a POST into a GET.
    """
    return urllib.request.build_opener(_Http, _Https, _NoRedirects)


class _Bounded(io.RawIOBase):
    """A socket's bytes, of which each read may wait until the deadline and no longer."""

    def __init__(self, raw: Any, socket: Any, deadline: float) -> None:
        self._raw, self._socket, self._deadline = raw, socket, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, deadline: float, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), sock, deadline))


class _Http(urllib.request.HTTPHandler):
    def do_open(self, http_class: Any, req: Any, **how: Any) -> Any:
        return super().do_open(_in_time(http_class), req, **how)


class _Https(urllib.request.HTTPSHandler):
    def do_open(self, http_class: Any, req: Any, **how: Any) -> Any:
        return super().do_open(_in_time(http_class), req, **how)


def _in_time(http_class: Callable[..., Any]) -> Any:
    """Makes connections whose time runs from when they are made."""

    def connection(*args: Any, timeout: float, **named: Any) -> Any:
        made = http_class(*args, timeout=timeout, **named)
        made.response_class = functools.partial(_Reply, deadline=time.monotonic() + timeout)
        return made

    return connection


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None
