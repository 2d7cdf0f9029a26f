"""Requests whose framing is not clear, each of which is refused: `UNCLEAR`, as pytest's parameters.

All are for `/`; `aimed` gives the same for another path.
"""

from __future__ import annotations

import pytest

__all__ = ["CHUNKED", "POST", "UNCLEAR", "aimed"]

POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

UNCLEAR = [
    pytest.param(POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", id="both"),
    pytest.param(POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", id="both2"),
    pytest.param(POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", id="two equal"),
    pytest.param(POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", id="two"),
    pytest.param(POST + b"Content-Length: 5, 5\r\n\r\nhello", id="list"),
    pytest.param(POST + b"Content-Length: +5\r\n\r\nhello", id="sign"),
    pytest.param(POST + b"Content-Length: 0x5\r\n\r\nhello", id="hex"),
    pytest.param(POST + b"Content-Length: 9999999999999999999\r\n\r\n", id="2^63"),
    pytest.param(POST + b"Content-Length:\r\n\r\n", id="empty length"),
    pytest.param(POST + b"Content-Length : 5\r\n\r\nhello", id="space before colon"),
    pytest.param(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", id="gzip, chunked"),
    pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n", id="xchunked"),
    pytest.param(POST + b"Transfer-Encoding: identity\r\n\r\n", id="identity"),
    pytest.param(
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", id="twice"
    ),
    pytest.param(CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n", id="chunked in 1.0"),
    pytest.param(POST + b"X: a\r\n b\r\n\r\n", id="obs-fold"),
    pytest.param(POST + b" X: a\r\n\r\n", id="folded first"),
    pytest.param(b"GET / HTTP/1.1\nHost: a\n\n", id="bare LF"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: a\nY: b\r\n\r\n", id="bare LF within"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rY: b\r\n\r\n", id="bare CR"),
    pytest.param(POST + b"X: a\x00b\r\n\r\n", id="NUL"),
    pytest.param(POST + b"X: a\x1b[31m\r\n\r\n", id="escape"),
    pytest.param(POST + b"X\x01: a\r\n\r\n", id="control in a name"),
    pytest.param(POST + b"no colon\r\n\r\n", id="no colon"),
    pytest.param(POST + b": empty\r\n\r\n", id="no name"),
    pytest.param(CHUNKED + b"5;ext=1\r\nhello\r\n0\r\n\r\n", id="extension"),
    pytest.param(CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n", id="space after size"),
    pytest.param(CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", id="0x"),
    pytest.param(CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", id="negative"),
    pytest.param(CHUNKED + b"\r\nhello\r\n0\r\n\r\n", id="no size"),
    pytest.param(CHUNKED + b"10000000000000000\r\n", id="2^64"),
    pytest.param(CHUNKED + b"0" * 40, id="endless size"),
    pytest.param(CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n", id="too long a chunk"),
    pytest.param(CHUNKED + b"5\nhello\n0\n\n", id="bare LF in chunks"),
    pytest.param(CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\n\r\n", id="trailer"),
    pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no Host"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", id="two Hosts"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: a/b@c\r\n\r\n", id="odd Host"),
    pytest.param(b"GET http://evil/ HTTP/1.1\r\nHost: a\r\n\r\n", id="absolute form"),
    pytest.param(b"CONNECT evil:443 HTTP/1.1\r\nHost: a\r\n\r\n", id="CONNECT"),
    pytest.param(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", id="asterisk"),
    pytest.param(b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", id="raw bytes in the path"),
    pytest.param(b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", id="fragment"),
    pytest.param(b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", id="HTTP/2"),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2 preface"),
    pytest.param(b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", id="HTTP/0.9"),
    pytest.param(b"GET /\r\n\r\n", id="no version"),
    pytest.param(b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", id="two spaces"),
    pytest.param(b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n", id="two spaces before the version"),
    pytest.param(b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", id="space after the version"),
    pytest.param(b"NONSENSE\r\n\r\n", id="nonsense"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS hello"),
]


def aimed(request: bytes, path: bytes) -> bytes:
    """The same request, for `path` if it is for `/`."""
    for verb in (b"POST", b"GET"):
        if request.startswith(verb + b" / "):
            return request.replace(b" / ", b" %b " % path, 1)
    return request
