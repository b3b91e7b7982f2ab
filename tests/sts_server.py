"""A real S3 server with its own token service (SeaweedFS), and an issuer of tokens such as Kubernetes' API server is one."""

from __future__ import annotations

import base64
import http.server
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from esvit_core.storage import StoreAddress, weed

AUDIENCE = "esvit-store"
ACCOUNT = "system:serviceaccount:esvit:esvit-trainer"
ROLE = "arn:aws:iam::role/train"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Issuer(http.server.ThreadingHTTPServer):
    """Signs tokens, and publishes the key with which they are checked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Keys)
        self.key = rsa.generate_private_key(65537, 2048)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def token(self, *, seconds: float = 600, audience: str = AUDIENCE, subject: str = ACCOUNT, key: Any = None) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": [audience], "sub": subject, "iat": now, "exp": now + int(seconds)}
        head = {"alg": "RS256", "typ": "JWT", "kid": "one"}
        text = ".".join(_encoded(json.dumps(part).encode()) for part in (head, claims))
        signature = (key or self.key).sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{text}.{_encoded(signature)}"

    def documents(self) -> dict[str, Any]:
        numbers = self.key.public_key().public_numbers()
        modulus, exponent = (_encoded(n.to_bytes((n.bit_length() + 7) // 8)) for n in (numbers.n, numbers.e))
        key = {"kty": "RSA", "kid": "one", "use": "sig", "alg": "RS256", "n": modulus, "e": exponent}
        place = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        return {"/.well-known/openid-configuration": place, "/keys": {"keys": [key]}}


class _Keys(http.server.BaseHTTPRequestHandler):
    server: Issuer

    def do_GET(self) -> None:
        document = self.server.documents().get(self.path)
        body = json.dumps(document or {}).encode()
        self.send_response(200 if document else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def configuration(issuer: Issuer, session: str, policy: dict[str, Any]) -> dict[str, Any]:
    """SeaweedFS's ``-s3.iam.config``: one role, for the tokens of one account."""
    trust = {
        "Effect": "Allow",
        "Principal": {"Federated": "kubernetes"},
        "Action": ["sts:AssumeRoleWithWebIdentity"],
    }
    provider = {"issuer": issuer.url, "clientId": AUDIENCE, "jwksUri": f"{issuer.url}/keys"}
    return {
        "sts": {
            "tokenDuration": session,
            "maxSessionLength": "12h",
            "issuer": "test",
            "signingKey": base64.b64encode(b"only for tests, 32 bytes or more").decode(),
        },
        "providers": [{"name": "kubernetes", "type": "oidc", "enabled": True, "config": provider}],
        "policy": {"defaultEffect": "Deny", "storeType": "memory"},
        "roles": [
            {
                "roleName": "train",
                "roleArn": ROLE,
                "trustPolicy": {"Version": "2012-10-17", "Statement": [trust]},
                "attachedPolicies": ["train"],
            }
        ],
        "policies": [{"name": "train", "document": policy}],
    }


class StsServer:
    """The server; ``session`` is how long its temporary credentials live."""

    def __init__(self, directory: Path, issuer: Issuer, session: str, policy: dict[str, Any]) -> None:
        directory.mkdir()
        weed.write_configuration(directory)
        for folder in ("data", weed.MASTER):
            (directory / folder).mkdir()
        (directory / "iam.json").write_text(json.dumps(configuration(issuer, session, policy)))
        self.ports = weed.free_ports()
        self.url = f"http://127.0.0.1:{self.ports.s3}"
        self.log = (directory / "log").open("wb")
        self.process = subprocess.Popen(
            [*weed.command(directory, self.ports), f"-s3.iam.config={directory / 'iam.json'}"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=weed.environment(directory),
        )
        access_key, secret_key = weed.read_credentials(directory)
        self.admin = StoreAddress(f"127.0.0.1:{self.ports.s3}", access_key, secret_key, secure=False)

    def stop(self) -> None:
        self.process.kill()  # asked to end it waits half a minute for its own connections
        self.process.wait(30)
        self.log.close()
