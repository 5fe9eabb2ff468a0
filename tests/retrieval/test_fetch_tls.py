"""HTTPS: HTTP/2, and the name stays the one that certificates are checked for."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from retrieval.addresses import FetchPolicy
from retrieval.fetch import Fetcher, Unreachable
from tests.retrieval.sites import names

NAME = "secure.test"


def certificate(folder: Path) -> Path:
    """A certificate for NAME that vouches for itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


class Http2Server:
    """Answers every request, in HTTP/2 only, with the name it was asked by."""

    def __init__(self) -> None:
        self.greeted: list[str | None] = []
        """The names in the TLS greetings, one for each connection."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        try:
            while data := await reader.read(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        self.answer(connection, event)
                writer.write(connection.data_to_send())
        except ConnectionError:
            pass
        finally:
            writer.close()

    def answer(
        self, connection: h2.connection.H2Connection, asked: h2.events.RequestReceived
    ) -> None:
        headers = dict(asked.headers or [])
        kind = [(":status", "200"), ("content-type", "text/html")]
        connection.send_headers(asked.stream_id or 1, kind)
        connection.send_data(asked.stream_id or 1, headers[b":authority"], end_stream=True)

    def greet(self, tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        self.greeted.append(name)


@asynccontextmanager
async def serving(pem: Path) -> AsyncIterator[tuple[Http2Server, int]]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    context.set_alpn_protocols(["h2"])
    handler = Http2Server()
    context.sni_callback = handler.greet
    server = await asyncio.start_server(handler.serve, "127.0.0.1", 0, ssl=context)
    try:
        yield handler, server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_http2_keeps_the_name_and_one_connection(tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    trusted = ssl.create_default_context(cafile=str(pem))
    resolve = names(secure_test=["127.0.0.1"], other_test=["127.0.0.1"])
    async with serving(pem) as (server, port):
        policy = FetchPolicy(ports=frozenset({port}), allowed_networks=("127.0.0.1/32",))
        async with Fetcher(policy, resolve=resolve, tls=trusted) as fetcher:
            urls = [f"https://{NAME}:{port}/{i}" for i in range(4)]
            answers = await asyncio.gather(*map(fetcher.fetch, urls))
            assert {answer.body for answer in answers} == {f"{NAME}:{port}".encode()}
            assert server.greeted == [NAME]
            with pytest.raises(Unreachable, match="certificate"):  # it is not other.test's
                await fetcher.fetch(f"https://other.test:{port}/")
        async with Fetcher(policy, resolve=resolve) as fetcher:
            with pytest.raises(Unreachable, match="certificate"):  # nobody known vouches for it
                await fetcher.fetch(urls[0])
